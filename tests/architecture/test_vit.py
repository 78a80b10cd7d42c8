"""The description of a ViT: derived sizes, JSON, damage."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

from qvit.architecture import VitArchitecture
from qvit.errors import FileFormatError

DEIT = VitArchitecture(
    name="deit_small_distilled_patch16_224",
    img_size=(224, 208),
    patch_size=(16, 14),
    in_chans=3,
    num_classes=1000,
    embed_dim=384,
    depth=12,
    num_heads=6,
    mlp_hidden=1536,
    qkv_bias=True,
    proj_bias=True,
    patch_bias=True,
    class_token=True,
    dist_token=True,
    reg_tokens=4,
    pos_embed=True,
    no_embed_class=False,
    pre_norm=False,
    final_norm=True,
    fc_norm=False,
    global_pool="token",
    pool_include_prefix=False,
    layer_scale=False,
    activation="gelu",
    norm_eps=1e-6,
)


def test_derived_sizes() -> None:
    assert DEIT.head_dim == 64
    assert DEIT.num_patches == 14 * 14  # 208 / 14 = 14.86: the rest is not seen
    assert DEIT.num_prefix_tokens == 6
    assert DEIT.num_tokens == 202
    assert DEIT.patch_features == 3 * 16 * 14
    assert DEIT.heads == ("head", "head_dist")
    plain = dataclasses.replace(DEIT, dist_token=False, class_token=False, reg_tokens=0)
    assert (plain.num_prefix_tokens, plain.num_tokens, plain.heads) == (0, 196, ("head",))


def test_json_round_trip() -> None:
    back = VitArchitecture.from_dict(json.loads(json.dumps(DEIT.to_dict())))
    assert back == DEIT
    assert hash(back) == hash(DEIT)


def test_a_whole_number_will_do_for_a_float() -> None:
    assert VitArchitecture.from_dict(DEIT.to_dict() | {"norm_eps": 0}).norm_eps == 0


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(VitArchitecture)])
@pytest.mark.parametrize(
    "value", [None, [], {}, "x" * 3, -1, 1.5, float("nan"), float("inf"), 1 << 40, [1, 2, 3], [0, 16], ["a", "b"], "224"]
)
def test_damaged_fields_are_refused_or_harmless(name: str, value: object) -> None:
    """Every field with every wrong kind of value: `FileFormatError` in one sentence, or a value of the right kind."""
    try:
        got = VitArchitecture.from_dict(DEIT.to_dict() | {name: value})
    except FileFormatError as error:
        message = str(error)
    else:
        message = ""
        # only a name may be any string
        assert name == "name"
        assert getattr(got, name) == value
    assert "\n" not in message


@pytest.mark.parametrize("flag", [f.name for f in dataclasses.fields(VitArchitecture) if str(f.type) == "bool"])
def test_numbers_are_no_flags(flag: str) -> None:
    for value in (0, 1, "true"):
        with pytest.raises(FileFormatError, match=flag):
            VitArchitecture.from_dict(DEIT.to_dict() | {flag: value})


@pytest.mark.parametrize("number", [f.name for f in dataclasses.fields(VitArchitecture) if str(f.type) == "int"])
def test_flags_are_no_numbers(number: str) -> None:
    with pytest.raises(FileFormatError, match=number):
        VitArchitecture.from_dict(DEIT.to_dict() | {number: True})


def test_missing_and_unknown_fields_are_named() -> None:
    good = DEIT.to_dict()
    for name in good:
        with pytest.raises(FileFormatError, match=name):
            VitArchitecture.from_dict({k: v for k, v in good.items() if k != name})
    with pytest.raises(FileFormatError, match="rotary"):
        VitArchitecture.from_dict(good | {"rotary": True})


@pytest.mark.parametrize(
    "change",
    [
        {"num_heads": 5},
        {"num_heads": 0},
        {"depth": 0},
        {"num_classes": 0},
        {"embed_dim": 0},
        {"img_size": [8, 224]},
        {"patch_size": [16, 0]},
        {"patch_size": [16, 1 << 20]},
        {"patch_size": [True, True]},
        {"reg_tokens": -1},
        {"reg_tokens": 1 << 20},
        {"mlp_hidden": 1 << 30},
        {"norm_eps": -1e-6},
        {"norm_eps": float("nan")},
        {"global_pool": "map"},
        {"activation": "relu"},
        {"class_token": False, "global_pool": "token", "dist_token": False, "reg_tokens": 0},
        {"class_token": False, "global_pool": "avg"},  # with a distillation token
        {"global_pool": "avg"},  # the same
    ],
)
def test_sizes_that_contradict_are_refused(change: dict) -> None:
    with pytest.raises(FileFormatError):
        VitArchitecture.from_dict(DEIT.to_dict() | change)


def test_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['timm'] = sys.modules['numpy'] = None; import qvit.architecture"
    subprocess.run([sys.executable, "-c", code], check=True)
