"""`.qvit` files that are wrong in their meaning but not in their checksum, so that the damage reaches reader and engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save

from qvit.integer.file import _checksum

Document = dict[str, Any]
Tensors = dict[str, np.ndarray]

# Values that a field of the header might hold by mistake or by malice.
_VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 5, 7, 8, 9, 16, 255, 1 << 16, 1 << 20, 1 << 31, 1 << 40, 0.0, 0.5, -0.5, 1e-30, 1e300,
    float("nan"), float("inf"), "", "avg", "token", "per_token", "per_channel", "gelu_tanh", "x" * 1000, [], [0, 0], [1, 1],
    [65536, 65536], {}, {"a": 1},
]  # fmt: skip
_FLOATS = [0.0, -0.0, 1.0, -1.0, 6e-8, 1e-38, 1e-45, 65504.0, 1e30, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan")]
_TYPES = [np.float16, np.float32, np.float64, np.uint8, np.int8, np.int16, np.int32, np.int64, np.bool_]


def rewrite(path: Path, change: Callable[[Document, Tensors], None]) -> None:
    """Changes header and tensors of a file and gives it the checksum of what it then holds."""
    with safe_open(path, framework="numpy") as file:
        document = json.loads(file.metadata()["qvit"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    change(document["qvit"], tensors)
    stored = json.loads(json.dumps(document["qvit"]))
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    document |= {"qvit": stored, "checksum": _checksum(stored, arrays)}
    path.write_bytes(save(arrays, metadata={"qvit": json.dumps(document)}))


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in children for place in [(*path, key), *_places(child, (*path, key))]]


def damage_header(draw: st.DataObject, header: Document) -> str:
    """Changes or removes one value anywhere in the header; says which."""
    places = _places(header)
    # Options of the architecture and of the specs are few beside the class names and points.
    telling = [place for place in places if place[0] not in ("classes", "points", "provenance")]
    place = draw.draw(st.sampled_from(telling if draw.draw(st.booleans()) else places))
    parent = header
    for key in place[:-1]:
        parent = parent[key]
    if draw.draw(st.integers(0, 9)) == 0:
        del parent[place[-1]]
        return f"without {place}"
    others = [value for other in telling if other[-1] == place[-1] for value in [_at(header, other)]]
    parent[place[-1]] = draw.draw(st.sampled_from(_VALUES + others))
    return f"{place} = {parent[place[-1]]!r}"


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


def damage_tensor(draw: st.DataObject, tensors: Tensors) -> str:
    """Removes, renames, reshapes, converts or refills one tensor; says which."""
    name = draw.draw(st.sampled_from(sorted(tensors)))
    array = tensors[name]
    kind = draw.draw(st.sampled_from(["remove", "rename", "shape", "type", "value", "noise", "empty"]))
    if kind in ("remove", "rename"):
        del tensors[name]
        if kind == "rename":
            tensors[f"{name}_"] = array
    elif kind == "shape":
        flat = array.reshape(-1)
        tensors[name] = draw.draw(st.sampled_from([flat[:-1], flat, flat[None], np.concatenate([flat, flat]), flat[:1]]))
    elif kind == "type":
        with np.errstate(all="ignore"):
            tensors[name] = array.astype(draw.draw(st.sampled_from(_TYPES)))
    elif kind == "empty" or not array.size:
        tensors[name] = array.reshape(-1)[:0]
    elif array.dtype == np.uint8 or kind == "noise":
        noise = np.random.default_rng(draw.draw(st.integers(0, 1 << 16))).integers(0, 256, array.nbytes, dtype=np.uint8)
        tensors[name] = noise.view(array.dtype).reshape(array.shape)
    else:
        with np.errstate(all="ignore"):
            value = np.asarray(draw.draw(st.sampled_from(_FLOATS))).astype(array.dtype)
        changed = array.copy()
        changed.reshape(-1)[draw.draw(st.integers(0, array.size - 1)) if draw.draw(st.booleans()) else slice(None)] = value
        tensors[name] = changed
    return f"{kind} {name}"
