"""Frozen Swin Transformers: their parts, round trip, damage."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.architecture import SwinArchitecture
from qvit.errors import FileFormatError
from qvit.integer.model import IntegerModel

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]

TABLE = "layers.0.blocks.1.attn.relative_position_bias_table"


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


def _drop(name: str) -> Change:
    return lambda _header, tensors: tensors.pop(name)  # type: ignore[return-value]


def _architecture(**fields: Any) -> Change:
    return lambda header, _tensors: header["architecture"].update(fields)


def _spec(name: str, **fields: Any) -> Change:
    return lambda header, _tensors: header["specs"][name].update(fields)


def test_parts(frozen_swin: IntegerModel) -> None:
    assert isinstance(frozen_swin.architecture, SwinArchitecture)
    assert frozen_swin.name == "swin_tiny_patch4_window7_224"
    assert frozen_swin.norm_pre is not None
    assert frozen_swin.pos_embed is frozen_swin.cls_token is frozen_swin.fc_norm is None
    first, second = frozen_swin.stages
    assert first.merging is None
    assert second.merging is not None
    assert second.merging.map == (8, 8)
    assert second.merging.norm.weight.shape == (64,)
    assert second.merging.reduction.weight.shape == (32, 64)
    assert second.merging.reduction.bias is None
    names = [layer.name for layer in frozen_swin.linears()]
    assert names[:2] == ["patch_embed.proj", "layers.0.blocks.0.attn.qkv"]
    assert names[9:11] == ["layers.1.downsample.reduction", "layers.1.blocks.0.attn.qkv"]
    assert names[-1] == "head.fc"
    assert len(names) == 3 * 4 + 3
    assert [block.name for block in frozen_swin.blocks] == ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"]
    windows = [block.attention.windows for block in frozen_swin.blocks]
    assert [w and (w.map, w.size, w.shift) for w in windows] == [
        ((8, 8), (4, 4), (0, 0)),
        ((8, 8), (4, 4), (2, 2)),
        ((4, 4), (4, 4), (0, 0)),
    ]
    assert frozen_swin.block_bits() == (4, 4)


def test_the_table_is_in_the_file_and_what_follows_from_it_is_not(frozen_swin: IntegerModel) -> None:
    assert frozen_swin.tensors[TABLE].shape == (49, 2)
    assert frozen_swin.tensors[TABLE].dtype == np.float16
    assert not [name for name in frozen_swin.tensors if "index" in name or "mask" in name]


def test_file_round_trip(frozen_swin: IntegerModel, tmp_path: Path) -> None:
    path = tmp_path / "swin.qvit"
    assert frozen_swin.save(path) == path.stat().st_size
    back = IntegerModel.load(path)
    assert back.architecture == frozen_swin.architecture
    assert back.specs == frozen_swin.specs
    assert back.classes == tuple("abcde")
    assert back.tensors.keys() == frozen_swin.tensors.keys()
    assert all(np.array_equal(back.tensors[name], array) for name, array in frozen_swin.tensors.items())
    images = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    runner = qvit.load(path)  # whichever engine runs it
    np.testing.assert_array_equal(
        torch.as_tensor(runner(images)).argmax(-1), torch.as_tensor(qvit.load(path, engine="reference")(images)).argmax(-1)
    )


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(keep: float, frozen_swin: IntegerModel, tmp_path: Path) -> None:
    path = tmp_path / "swin.qvit"
    frozen_swin.save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(FileFormatError) as caught:
        IntegerModel.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop(TABLE), f"{TABLE} is missing"),
        (_with(TABLE, lambda x: x[:-1]), r"table is float16\[48, 2\] where float\[49, 2\]"),
        (_with(TABLE, lambda x: x[:, :1]), r"table is float16\[49, 1\]"),
        (_with(TABLE, lambda x: _set(x, np.nan)), "not finite"),
        (_with(TABLE, lambda x: x.astype(np.int16)), "table is int16"),
        (_drop("layers.1.downsample.reduction.weight"), "layers.1.downsample.reduction.weight is missing"),
        (_drop("layers.1.downsample.norm.bias"), "layers.1.downsample.norm.bias is missing"),
        (_drop("patch_embed.norm.weight"), "patch_embed.norm.weight is missing"),
        (_drop("head.fc.bias"), "head.fc.bias is missing"),
        (_with("layers.1.downsample.norm.weight", lambda x: x[:32]), r"where float\[64\]"),
        (_with("layers.1.downsample.reduction.weight", lambda x: x[:-1]), "at 4 bits takes 1024 bytes"),
        (_with("layers.0.blocks.0.attn.map_scale", lambda x: _set(x, 0)), "not positive"),
        (lambda header, tensors: tensors.update(pos_embed=np.zeros((1, 64, 16), np.float32)), "pos_embed belongs to nothing"),
        (lambda header, tensors: header["architecture"].pop("family"), "missing or unknown"),
        (_architecture(family="vit"), "missing or unknown"),
        (_architecture(family="beit"), "family is 'beit'"),
        (_architecture(windows=[[2, 4], [4, 4]]), r"table is float16\[49, 2\] where float\[21, 2\]"),
        (_architecture(windows=[[3, 3], [4, 4]]), "contradict each other"),
        (_architecture(windows=[[4, 4]]), "differ in length"),
        (_architecture(num_heads=[2, 3]), "contradict each other"),
        (_architecture(num_heads=[4, 4]), r"where float\[4, 1, 1\]|where float\[4, 4\]|where float\[49, 4\]"),
        (_architecture(depths=[2, 2]), r"layers\.1\.blocks\.1"),
        (_architecture(depths=[1, 1]), "belongs to nothing"),
        (_architecture(mlp_hidden=[64, 64]), r"layers\.1\.blocks\.0\.mlp"),
        (_architecture(qkv_bias=False), r"qkv\.bias belongs to nothing"),
        (_architecture(img_size=[64, 64]), "not the architecture's"),
        (_spec("layers.0.blocks.0.attn.q", scale="per_token"), r"layers\.0\.blocks\.0\.attn\.q: .*PerToken"),
        (_spec("layers.0.blocks.0.attn.map", scale="per_token"), r"attn\.map: .*PerToken"),
        (_spec("layers.0.blocks.0.mlp.fc1.input", scale="per_token"), r"fc1\.input: .*PerToken"),
        (_spec("layers.1.downsample.reduction.input", scale="per_token"), r"reduction\.input: .*PerToken"),
    ],
)  # fmt: skip
def test_refusals(frozen_swin: IntegerModel, change: Change, message: str) -> None:
    with pytest.raises(FileFormatError, match=message) as caught:
        _changed(frozen_swin, change)
    assert "\n" not in str(caught.value)


def test_a_huge_image_is_refused_before_memory_is_taken(frozen_swin: IntegerModel) -> None:
    """No tensor grows with the image, but the masks of shifted windows would."""

    def change(header: dict[str, Any], _tensors: dict[str, np.ndarray]) -> None:
        header["architecture"]["img_size"] = [65536, 65536]
        header["preprocessing"]["input_size"] = [3, 65536, 65536]

    with pytest.raises(FileFormatError, match="out of range"):
        _changed(frozen_swin, change)
