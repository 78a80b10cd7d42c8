"""Runs the CUDA sources on the CPU: the host's C++ compiler and ``emulation*.h`` in place of NVRTC and a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.compiler import SOURCES
from qvit.engines.cuda.device import Gpu, Queue
from qvit.engines.cuda.tiles import MOST_SHARED
from qvit.engines.cuda.tuned import Tuned

HERE = Path(__file__).parent
COMPILER = shutil.which("g++") or shutil.which("clang++")
FLAGS = ["-std=c++17", "-O1", "-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
FLAGS += ["-x", "c++", "-DQVIT_EMULATION", "-Wno-unknown-pragmas", f"-I{SOURCES}", f"-I{HERE}"]


class Emulated:
    """A `qvit.engines.cuda.device.Device` that computes at once, on the CPU."""

    device = torch.device("cpu")
    multiprocessors = 2
    most_shared = MOST_SHARED
    tuned = Tuned()
    stream = None

    def __init__(self, hopper: bool = False) -> None:
        self.hopper = hopper
        if COMPILER is None:
            pytest.skip("no C++ compiler to emulate a GPU with")
        self._folder = Path(tempfile.gettempdir()) / "qvit-emulated"
        self._folder.mkdir(exist_ok=True)
        self._libraries: dict[Path, Any] = {}

    def launch(self, launch: Launch, behind: bool = False) -> None:
        library = self._library(launch)
        library.emulate(ctypes.byref(launch.packed), *launch.grid, launch.threads, launch.shared)
        assert library.emulated_touched_twice() == 0

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def prepared(self, launch: Launch, behind: bool = False) -> Queue:
        return lambda stream: self.launch(launch)

    def _library(self, launch: Launch) -> Any:
        defines = [f"-D{key}={value}" for key, value in sorted(launch.defines.items())]
        texts = [path.read_bytes() for path in sorted([*SOURCES.glob("*.cu*"), *HERE.glob("*.h")])]
        name = hashlib.sha256(b"|".join([*texts, launch.kernel.encode(), *(define.encode() for define in defines)])).hexdigest()
        path = self._folder / f"{launch.kernel}-{name[:24]}.so"
        if path not in self._libraries:
            if not path.exists():
                beside = path.with_suffix(f".{os.getpid()}")
                command = [str(COMPILER), *FLAGS, *defines, str(SOURCES / f"{launch.kernel}.cu"), "-o", str(beside)]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
                beside.replace(path)
            self._libraries[path] = ctypes.CDLL(str(path))
        return self._libraries[path]


def open_gpu(hopper: bool) -> Any:
    """A GPU, or an emulated one; with Hopper's own products or with those of every GPU."""
    if not torch.cuda.is_available():
        return Emulated(hopper)
    gpu = Gpu()
    if hopper and not gpu.hopper:
        pytest.skip("the GPU is no Hopper")
    gpu.hopper = hopper
    gpu.tuned = Tuned()  # the rules are what is tested
    return gpu
