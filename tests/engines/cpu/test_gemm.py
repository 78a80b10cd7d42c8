"""The GEMM kernels against a plain loop: benchmarks/cpu_gemm.cpp checks each kernel that this processor runs, at all widths.

The compiler takes the environment's CXXFLAGS: ``CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover"`` for instance.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "qvit" / "engines" / "cpu" / "src" / "gemm"
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512vbmi -Wno-maybe-uninitialized -Wno-uninitialized"
X86 = {"avx2": "-mavx2", "avx2table": "-mavx2", "avxvnni": "-mavx2 -mavxvnni"} | dict.fromkeys(
    ("avx512vnni", "avx512pairs", "avx512table"), AVX512
)
ARM = {"neon": "-march=armv8.2-a+dotprod"}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    instructions = {"x86_64": X86, "aarch64": ARM}.get(platform.machine())
    if compiler is None or instructions is None:
        pytest.skip(f"needs a C++ compiler, on x86-64 or aarch64, not {platform.machine()}")
    folder = tmp_path_factory.mktemp("gemm")
    files = dict.fromkeys(("gemm", "packed_codes", "gemm_generic"), "")
    files |= {f"gemm_{name}": flags for name, flags in instructions.items()}
    compile_cpp = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", *os.environ.get("CXXFLAGS", "").split()]
    objects = []
    for name, flags in files.items():
        objects.append(str(folder / f"{name}.o"))
        command = [*compile_cpp, *flags.split(), "-c", str(SOURCES / f"{name}.cpp"), "-o", objects[-1]]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    path = folder / "cpu_gemm"
    source = str(ROOT / "benchmarks" / "cpu_gemm.cpp")
    subprocess.run([*compile_cpp, f"-I{SOURCES}", source, *objects, "-o", str(path)], check=True)
    return path


def test_every_kernel_is_exact(program: Path) -> None:
    result = subprocess.run([program, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    checks, wrong = map(int, re.fullmatch(r"(\d+) checks, (\d+) wrong\n", result.stdout).groups())  # type: ignore[union-attr]
    assert wrong == 0
    assert checks >= 768  # the portable kernel alone


def test_a_wrong_sum_is_found(program: Path) -> None:
    result = subprocess.run([program, "--check", "off by one"], capture_output=True, text=True)
    assert result.returncode == 1
    assert "WRONG: " in result.stdout
