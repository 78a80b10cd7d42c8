"""The `.qvit` file: one safetensors file whose metadata holds one JSON header. Nothing is ever unpickled.

Tensors of a linear layer ``X``: ``X.weight`` (uint8, packed codes), ``X.weight_scale``, ``X.bias``, ``X.input_scale``,
``X.input_offset``; of attention ``Y``: ``Y.q_scale`` and so on, ``Y.rectify_q.weight``; the rest as timm names them. Float
vectors are float16 where the student was rounded to it (`qvit.integer.freeze`), else float32.

Header: ``format`` (version, see `FORMAT`), ``checksum`` (CRC-32 of the next, written as JSON with sorted keys, and of all
tensors in the order of their names: name, type, shape and contents), ``qvit`` (the header of `IntegerModel`, with equal specs
stored once).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qvit.errors import FileFormatError, InputError
from qvit.files import write_atomically

# The highest version that is read. A file has the lowest that says what it holds, so that an older qvit reads it if it can:
#   1   all that is not below
#   2   a residual stream that is rounded (``residual``), which a reader of version 1 would pass over
FORMAT = 2
_KEY = "qvit"
_LARGEST_FILE = 4 << 30


def write(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> int:
    """Writes atomically; returns the size in bytes. Raises `InputError` where the file cannot be written."""
    data = encode(header, tensors)
    write_atomically(path, data)
    return len(data)


def encode(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> bytes:
    """The contents of the file."""
    names: dict[str, int] = {}
    points = {}
    for point, spec in header["specs"].items():
        points[point] = names.setdefault(json.dumps(spec, sort_keys=True), len(names))
    stored = json.loads(json.dumps({**header, "specs": [json.loads(spec) for spec in names], "points": points}))
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    version = 1 if stored.get("residual", "float32") == "float32" else 2
    document = {"format": version, "checksum": _checksum(stored, arrays), "qvit": stored}
    return save(arrays, metadata={_KEY: json.dumps(document, separators=(",", ":"))})


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Reads header and tensors, not yet checked against each other (`IntegerModel.from_tensors` does that).

    Raises:
        InputError: there is no such file, or it cannot be read.
        FileFormatError: it is no `.qvit` file, truncated, corrupted, too large or of a newer format.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path.") from None
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a .qvit file.")
    if size > _LARGEST_FILE:
        raise FileFormatError(f"{path} has {size} bytes, more than any .qvit file: it is not one.")
    try:
        with safe_open(path, framework="numpy") as file:
            document = json.loads((file.metadata() or {})[_KEY])
            version = document["format"]
            if type(version) is not int or version < 1:
                raise FileFormatError(f"{path} is damaged, its format is {version!r}: copy or freeze it again.")
            if version > FORMAT:
                raise FileFormatError(
                    f"{path} is of format {version} and this qvit reads up to {FORMAT}: upgrade with pip install -U qvit."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        header = dict(document["qvit"])
        intact = document["checksum"] == _checksum(header, tensors)
        specs = header["specs"]
        header["specs"] = {point: specs[index] for point, index in header.pop("points").items()}
    except FileFormatError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from None
    except (SafetensorError, KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError, MemoryError) as error:
        raise FileFormatError(
            f"{path} is no .qvit file, or it is truncated or damaged ({type(error).__name__}): copy or freeze it again."
        ) from None
    if not intact:
        raise FileFormatError(f"{path} is damaged, its checksum does not match its contents: copy or freeze it again.")
    return header, tensors


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> int:
    value = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name]
        value = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), value)
        value = zlib.crc32(array.reshape(-1).view(np.uint8).data, value)
    return value
