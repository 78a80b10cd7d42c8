"""Compiles the CUDA sources for the GPU at hand, once: NVRTC (no nvcc, no host compiler), and a cache on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from qvit.errors import MissingDependencyError, UnsupportedModelError

SOURCES = Path(__file__).parent / "src"
HEADERS = tuple(sorted(path.name for path in SOURCES.glob("*.cuh")))
# No contraction to fused multiply-adds: the reference engine rounds products.
_OPTIONS = ("-std=c++17", "-fmad=false", "-default-device")


def compile_kernel(name: str, defines: Mapping[str, int], architecture: str) -> bytes:
    """The machine code of ``src/<name>.cu``; needs no GPU.

    Args:
        name: of the source.
        defines: its constants.
        architecture: ``sm_80`` and later.

    Raises:
        MissingDependencyError: cuda-bindings or NVRTC is not installed.
        UnsupportedModelError: the source does not compile, as when a kernel takes more than the architecture has.
    """
    options = [*_OPTIONS, f"--gpu-architecture={architecture}", *(f"-D{key}={value}" for key, value in sorted(defines.items()))]
    texts = [(SOURCES / file).read_bytes() for file in (f"{name}.cu", *HEADERS)]
    nvrtc = _nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    parts = [*texts, *(option.encode() for option in options), f"{major}.{minor}".encode()]
    path = cache_folder() / f"{name}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:32]}.cubin"
    if path.exists():
        return path.read_bytes()
    code = _compile(nvrtc, name, texts, options)
    _keep(path, code)
    return code


def check_compiler() -> None:
    """Raises `MissingDependencyError` where cuda-bindings or NVRTC is not installed."""
    _nvrtc()


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``QVIT_CACHE``, else ``qvit/cuda`` in the user's cache folder."""
    if given := os.environ.get("QVIT_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qvit" / "cuda"


def _keep(path: Path, code: bytes) -> None:
    """Writes beside and renames; a cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:
        pass


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(
            f"The CUDA engine compiles its kernels with NVRTC, which is missing ({error}): pip install "
            "'cuda-bindings[all]' of your driver's CUDA version, or use engine='reference'."
        ) from None
    return nvrtc


def _compile(nvrtc: Any, name: str, texts: list[bytes], options: list[str]) -> bytes:
    source, *headers = texts
    _, program = nvrtc.nvrtcCreateProgram(
        source, f"{name}.cu".encode(), len(headers), headers, [file.encode() for file in HEADERS]
    )
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if int(status) != 0:
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        lines = [line for line in log.decode(errors="replace").splitlines() if "error" in line] or ["no message"]
        raise UnsupportedModelError(
            f"The CUDA kernel {name} does not compile with {' '.join(options)} ({lines[0].strip()}): use engine='reference'."
        )
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    code = b" " * size
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(program)
    return code
