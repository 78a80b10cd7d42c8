"""`IntegerModel.from_tensors`: every shape, range and cross-reference is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qvit.errors import FileFormatError
from qvit.integer.model import IntegerModel

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]


def _changed(model: IntegerModel, change: Change) -> IntegerModel:
    header = copy.deepcopy(dict(model.header))
    tensors = dict(model.tensors)
    change(header, tensors)
    return IntegerModel.from_tensors(header, tensors)


def _with(name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Change:
    def change(_header: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = edit(tensors[name].copy())

    return change


def _set(array: np.ndarray, value: float) -> np.ndarray:
    array.reshape(-1)[0] = value
    return array


def _header(*path: str, value: object) -> Change:
    def change(header: dict[str, Any], _tensors: dict[str, np.ndarray]) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


def _drop(name: str) -> Change:
    return lambda _header, tensors: tensors.pop(name)  # type: ignore[return-value]


_SPEC = {"bits": 4, "signed": True, "scale": "per_head", "offset": "none", "operand": "q"}


def test_unchanged(frozen: IntegerModel) -> None:
    assert _changed(frozen, lambda header, tensors: None).name == "vit_tiny_patch16_224"
    assert frozen.block_bits() == (4, 4)
    names = [layer.name for layer in frozen.linears()]
    assert names[:3] == ["patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn.proj"]
    assert names[-1] == "head"
    assert len(names) == 2 * 4 + 2
    assert frozen.linears()[3].weight.spec.bits == 3


def test_float16_vectors_arrive_as_float32(frozen: IntegerModel) -> None:
    assert frozen.tensors["norm.weight"].dtype == np.float16
    assert frozen.norm is not None
    assert frozen.norm.weight.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("blocks.1.norm2.bias"), "blocks.1.norm2.bias is missing"),
        (_drop("blocks.0.attn.qkv.weight"), "blocks.0.attn.qkv.weight is missing"),
        (lambda header, tensors: tensors.update(extra=np.zeros(1, np.float32)), "extra belongs to nothing"),
        (_with("head.bias", lambda x: x[:-1]), r"head.bias is float16\[9\] where float\[10\]"),
        (_with("head.bias", lambda x: x.astype(np.float64)), "head.bias is float64"),
        (_with("norm.weight", lambda x: _set(x, np.nan)), "norm.weight holds values that are not finite"),
        (_with("pos_embed", lambda x: _set(x, np.inf)), "pos_embed holds values that are not finite"),
        (_with("blocks.0.attn.q_scale", lambda x: _set(x, np.nan)), "q_scale holds values that are not finite"),
        (_with("blocks.0.attn.q_scale", lambda x: _set(x, -1)), "q_scale holds a scale that is not positive"),
        (_with("blocks.0.mlp.fc1.weight_scale", lambda x: _set(x, 0)), "weight_scale holds a scale that is not positive"),
        (_with("blocks.0.mlp.fc1.input_scale", lambda x: x.repeat(2)), r"input_scale is float16\[2\]"),
        (_with("blocks.0.mlp.fc1.weight", lambda x: x[:-1]), "at 3 bits takes 216 bytes"),
        (_with("blocks.0.mlp.fc1.weight", lambda x: x.view(np.int8)), "at 3 bits takes 216 bytes"),
        (_header("residual", value="bfloat16"), "residual is 'bfloat16', not float32 or float16"),
        (_header("residual", value=None), "residual is None"),
        (_header("classes", value=["a", "b"]), "names 2 classes for 10 outputs"),
        (_header("classes", value="0123456789"), "no list of names"),
        (_header("classes", value=list(range(10))), "no list of names"),
        (_header("specs", "blocks.0.attn.q", "bits", value=9), "bits=9 is out of range"),
        (_header("specs", "blocks.0.attn.q", "bits", value=1), "bits=1 is out of range"),
        (_header("specs", "blocks.0.attn.q", "scale", value="per_channel"), "refused for the operand 'q'"),
        (_header("specs", "blocks.0.attn.q", "operand", value="k"), "of another operand"),
        (_header("specs", "blocks.0.attn.q", "bits", value=None), "bits=None"),
        (_header("specs", "blocks.0.attn.q", value=3), "header is damaged"),
        (_header("specs", value={}), "is missing or of another operand"),
        (_header("specs", "blocks.9.attn.q", value=_SPEC), "The spec of blocks.9.attn.q belongs to nothing"),
        (_header("specs", "patch_embed.proj.input", "signed", value=True), "not that of pixels"),
        (_header("architecture", "depth", value=3), "blocks.2"),
        (_header("architecture", "depth", value=1), "belongs to nothing"),
        (_header("architecture", "depth", value=1 << 30), "out of range"),
        (_header("architecture", "num_heads", value=5), "contradict each other"),
        (_header("architecture", "num_heads", value=0), "out of range"),
        (_header("architecture", "embed_dim", value="12"), "not of type int"),
        (_header("architecture", "img_size", value=[8]), "not a height and a width"),
        (_header("architecture", "patch_size", value=[65536, 65536]), "contradict each other"),
        (_header("architecture", "norm_eps", value=float("nan")), "norm_eps"),
        (_header("architecture", "global_pool", value="map"), "global_pool"),
        (_header("architecture", "activation", value="relu"), "activation"),
        (_header("architecture", "colour", value=1), "'colour' is missing or unknown"),
        (_header("preprocessing", "input_size", value=[3, 8, 8]), "one positive std per channel"),
        (_header("preprocessing", "input_size", value=[1, 9, 8]), "not the architecture's"),
        (_header("preprocessing", "mean", value=[float("nan")]), "finite"),
        (_header("preprocessing", "mean", value=["x"]), "preprocessing"),
        (_header("preprocessing", "std", value=[0.0]), "positive std"),
        (_header("preprocessing", "crop_pct", value=2), "crop_pct"),
        (_header("preprocessing", "crop_pct", value=float("nan")), "crop_pct"),
        (_header("rectify_eps", value="tiny"), "rectify_eps"),
        (_header("rectify_eps", value=float("nan")), "rectify_eps"),
        (_header("rectify_eps", value=None), "rectify_k.bias belongs to nothing"),
        (_header("provenance", value=None), "header is damaged"),
        (lambda header, tensors: header.pop("architecture"), "header is damaged"),
    ],
)  # fmt: skip
def test_refusals(frozen: IntegerModel, change: Change, message: str) -> None:
    with pytest.raises(FileFormatError, match=message) as caught:
        _changed(frozen, change)
    assert "\n" not in str(caught.value)


def test_a_huge_patch_is_refused_before_memory_is_taken(frozen: IntegerModel) -> None:
    def change(header: dict[str, Any], _tensors: dict[str, np.ndarray]) -> None:
        header["architecture"] |= {"img_size": [65536, 65536], "patch_size": [65536, 65536]}
        header["preprocessing"]["input_size"] = [1, 65536, 65536]

    with pytest.raises(FileFormatError, match=r"patch_embed\.proj\.weight"):
        _changed(frozen, change)


def test_groups_of_two_sizes_are_refused(frozen: IntegerModel) -> None:
    def change(header: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        # fc2 of a wider model, so that groups of 64 and 128 both divide its input.
        header["architecture"] |= {"mlp_hidden": 128}
        for index in (0, 1):
            name = f"blocks.{index}.mlp"
            tensors[f"{name}.fc1.weight"] = np.zeros(128 * 12 * 3 // 8, np.uint8)
            tensors[f"{name}.fc1.weight_scale"] = np.ones((128, 1), np.float32)
            tensors[f"{name}.fc1.bias"] = np.zeros(128, np.float32)
            tensors[f"{name}.fc2.weight"] = np.zeros(128 * 12 * 2 // 8, np.uint8)
            tensors[f"{name}.fc2.input_scale"] = np.ones(2, np.float32)
            tensors[f"{name}.fc2.weight_scale"] = np.ones((12, 1), np.float32)
            tensors[f"{name}.fc2.input_offset"] = np.zeros(128, np.float32)
            header["specs"][f"{name}.fc2.input"]["scale"] = "per_group_64"
            header["specs"][f"{name}.fc2.weight"]["scale"] = "per_group_128"

    with pytest.raises(FileFormatError, match="differ in size"):
        _changed(frozen, change)
