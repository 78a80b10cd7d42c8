"""Runs the CUDA sources on the CPU: the host's C++ compiler and ``emulation*`` in place of NVRTC and a GPU."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
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
FLAGS = ["-std=c++17", "-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
# What kernels have in common is compiled once, for speed. Kernels are many, and most run once: with no optimisation they are
# compiled in half the time and the tests take no longer, and C++'s own headers and libraries would take as long as a kernel.
# NVRTC refuses more than g++ does by default, such as arrays of no elements.
COMMON = [*FLAGS, "-O3"]
KERNEL = [*FLAGS, "-O0", "-nostdinc++", "-nostdlib", "-DQVIT_EMULATION", "-x", "c++"]
KERNEL += ["-Wno-unknown-pragmas", "-Werror=pedantic"]
INCLUDES = [f"-I{SOURCES}", f"-I{HERE}"]


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
        self._libraries: dict[str, Any] = {}  # by what `Launch.code` says

    def compile(self, launches: Iterable[Launch]) -> None:
        pass

    def launch(self, launch: Launch, behind: bool = False) -> None:
        library = self._library(launch)
        library.emulate(ctypes.byref(launch.packed), *launch.grid, launch.threads, launch.shared)
        assert library.emulated_touched_twice() == 0

    def current(self) -> AbstractContextManager[object]:
        return nullcontext()

    def prepared(self, launch: Launch, behind: bool = False) -> Queue:
        return lambda stream: self.launch(launch)

    def _library(self, launch: Launch) -> Any:
        if launch.code not in self._libraries:
            defines = [f"-D{key}={value}" for key, value in sorted(launch.defines.items())]
            common = self._compiled("common", COMMON, [str(path) for path in sorted(HERE.glob("*.cpp"))])
            files = [*INCLUDES, str(SOURCES / f"{launch.kernel}.cu"), "-x", "none", str(common), "-lgcc"]
            options = [*KERNEL, *defines, f'-DCOMMON="{common.name}"']  # which the library needs, so its name is to tell it
            self._libraries[launch.code] = ctypes.CDLL(str(self._compiled(launch.kernel, options, files)))
        return self._libraries[launch.code]

    def _compiled(self, kind: str, options: list[str], files: list[str]) -> Path:
        """The library of these files, unless it is there: its name tells options and all sources."""
        name = hashlib.sha256(b"|".join([_sources(), *(option.encode() for option in options)])).hexdigest()
        path = self._folder / f"{kind}-{name[:24]}.so"
        if not path.exists():
            beside = path.with_suffix(f".{os.getpid()}")
            command = [str(COMPILER), *options, *files, "-o", str(beside)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            beside.replace(path)
        return path


@cache
def _sources() -> bytes:
    """All of them, which do not change while tests run."""
    return b"|".join(path.read_bytes() for path in sorted([*SOURCES.glob("*.cu*"), *HERE.glob("*.h"), *HERE.glob("*.cpp")]))


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
