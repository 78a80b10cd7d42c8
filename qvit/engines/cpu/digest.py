"""What the compiled module was made from, so that an old one is not taken for one of the sources as they are now.

CMake runs this file and compiles what it prints into the module (`_native.sources`). Where the sources lie beside this file, as
in a checkout but not in a wheel, `CpuEngine` compares the two before it uses the module.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
_SUFFIXES = (".cpp", ".h")


def digest(folder: Path = SOURCES) -> str:
    """SHA-256, in hexadecimal, of the C++ files below a folder and their names; empty where there are none."""
    found = (path for path in folder.rglob("*") if path.suffix in _SUFFIXES and not path.name.startswith("."))
    files = sorted(
        (path.relative_to(folder).as_posix(), path) for path in found if path.is_file()
    )  # an editor's locks are none
    whole = hashlib.sha256()
    for name, path in files:
        content = path.read_bytes()
        whole.update(f"{name}\0{len(content)}\0".encode() + content)
    return whole.hexdigest() if files else ""


@cache
def is_current(sources: str | None) -> bool:
    """Whether a module that says so was made from the sources as they are, or there are none; read once a process."""
    return digest(SOURCES) in (sources, "")


if __name__ == "__main__":
    print(digest())
