"""The description of a Swin Transformer: derived sizes, JSON, damage."""

from __future__ import annotations

import dataclasses
import json

import pytest

from qvit.architecture import SwinArchitecture
from qvit.errors import FileFormatError

TINY = SwinArchitecture(
    name="swin_tiny_patch4_window7_224",
    img_size=(224, 448),
    patch_size=(4, 4),
    in_chans=3,
    num_classes=1000,
    embed_dim=96,
    depths=(2, 2, 6, 2),
    num_heads=(3, 6, 12, 24),
    windows=((7, 7), (7, 7), (7, 7), (7, 7)),
    mlp_hidden=(384, 768, 1536, 3072),
    qkv_bias=True,
    norm_eps=1e-5,
)


def test_derived_sizes() -> None:
    assert (TINY.stages, TINY.depth) == (4, 12)
    assert TINY.grid == (56, 112)
    assert TINY.num_patches == TINY.num_tokens == 56 * 112
    assert TINY.patch_features == 48
    assert [TINY.width(stage) for stage in range(4)] == [96, 192, 384, 768]
    assert [TINY.head_dim(stage) for stage in range(4)] == [32] * 4
    assert [TINY.map(stage) for stage in range(4)] == [(56, 112), (28, 56), (14, 28), (7, 14)]
    assert TINY.num_features == 768
    assert TINY.heads == ("head.fc",)


def test_every_second_block_shifts_where_there_are_several_windows() -> None:
    assert [TINY.shift(0, block) for block in range(3)] == [(0, 0), (3, 3), (0, 0)]
    assert TINY.shift(3, 1) == (0, 3)  # one window high, two wide
    square = dataclasses.replace(TINY, img_size=(224, 224))
    assert square.shift(3, 1) == (0, 0)


def test_json_round_trip() -> None:
    back = SwinArchitecture.from_dict(json.loads(json.dumps(TINY.to_dict())))
    assert back == TINY
    assert hash(back) == hash(TINY)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SwinArchitecture)])
@pytest.mark.parametrize(
    "value",
    [None, [], {}, "xxx", -1, 1.5, float("nan"), 1 << 40, [1, 2, 3], [0, 16], ["a", "b"], [[7, 7]], [[7, 7, 7]] * 4,
     [[0, 7]] * 4, [True] * 4, [-1] * 4, [0] * 4, [1 << 40] * 4, "224"],
)  # fmt: skip
def test_damaged_fields_are_refused_or_harmless(name: str, value: object) -> None:
    """Every field with every wrong kind of value: `FileFormatError` in one sentence, or a value of the right kind."""
    try:
        got = SwinArchitecture.from_dict(TINY.to_dict() | {name: value})
    except FileFormatError as error:
        message = str(error)
    else:
        message = ""
        assert name == "name"  # may be any string
        assert getattr(got, name) == value
    assert "\n" not in message


@pytest.mark.parametrize(
    "change",
    [
        {"depths": (2, 2, 6)},
        {"num_heads": (3, 6, 12)},
        {"windows": ((7, 7),) * 3},
        {"mlp_hidden": (384,) * 5},
        {"depths": (), "num_heads": (), "windows": (), "mlp_hidden": ()},
        {"depths": (1,) * 9, "num_heads": (1,) * 9, "windows": ((1, 1),) * 9, "mlp_hidden": (1,) * 9, "img_size": (4096, 4096)},
        {"depths": (2, 2, 0, 2)},
        {"embed_dim": 1 << 20},
        {"num_heads": (3, 6, 12, 25)},
        {"windows": ((7, 7), (7, 7), (7, 7), (7, 8))},
        {"img_size": (112, 448)},  # 7 rows before the last merging
        {"img_size": (3, 448)},
        {"img_size": (65536, 65536)},
        {"windows": ((56, 56), (7, 7), (7, 7), (7, 7))},
        {"norm_eps": -1.0},
        {"norm_eps": float("nan")},
    ],
)
def test_sizes_that_contradict_or_would_fill_memory_are_refused(change: dict) -> None:
    with pytest.raises(FileFormatError):
        SwinArchitecture.from_dict(TINY.to_dict() | change)
