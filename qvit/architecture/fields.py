"""Reading the fields of an architecture from a JSON object that may be damaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from qvit.errors import FileFormatError

_LARGEST = 1 << 20
_SCALARS: dict[str, type] = {"str": str, "int": int, "bool": bool, "float": float}


def read_fields(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the dataclass ``cls``, each of its declared type; lists become tuples.

    Raises:
        FileFormatError: a field is missing, unknown or of the wrong type.
    """
    declared = {f.name: str(f.type) for f in fields(cls)}
    if set(data) != set(declared):
        odd = sorted(set(data) ^ set(declared))[0]
        raise FileFormatError(
            f"The architecture's field {odd!r} is missing or unknown: the file is damaged or of another version."
        )
    return {name: _value(name, kind, data[name]) for name, kind in declared.items()}


def _value(name: str, kind: str, value: Any) -> Any:
    if kind == "tuple[int, int]":
        return _pair(name, value)
    if kind == "tuple[int, ...]":
        if not isinstance(value, (list, tuple)) or not all(type(v) is int for v in value):
            raise FileFormatError(f"The architecture's {name} is {value!r}, not a list of whole numbers: the file is damaged.")
        return tuple(value)
    if kind == "tuple[tuple[int, int], ...]":
        if not isinstance(value, (list, tuple)):
            raise FileFormatError(f"The architecture's {name} is {value!r}, not a list of sizes: the file is damaged.")
        return tuple(_pair(name, pair) for pair in value)
    scalar = _SCALARS[kind]
    if not (type(value) is scalar or (scalar is float and type(value) is int)):
        raise FileFormatError(f"The architecture's {name} is {value!r}, not of type {scalar.__name__}: the file is damaged.")
    return value


def _pair(name: str, value: Any) -> tuple[int, int]:
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(v) is int and 0 < v <= 65536 for v in value)
    if not good:
        raise FileFormatError(f"The architecture's {name} is {value!r}, not a height and a width: the file is damaged.")
    return (value[0], value[1])


def check_sizes(architecture: Any, names: tuple[str, ...]) -> None:
    """Raises `FileFormatError` where a size, or one of a list of sizes, is out of range, or norm_eps is no small number."""
    for name in names:
        value = getattr(architecture, name)
        if any(not 0 < size <= _LARGEST for size in (value if isinstance(value, tuple) else (value,))):
            raise FileFormatError("A size of the architecture is out of range: the file is damaged.")
    if not 0 <= architecture.norm_eps < 1:
        raise FileFormatError(
            f"The architecture's norm_eps is {architecture.norm_eps!r}, not a small number: the file is damaged."
        )
