"""The Swin family: which of timm's models it takes, what it refuses and why, description and rebuilding."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from qvit.architecture import SwinArchitecture
from qvit.convert import build, quantize
from qvit.errors import SpecError, UnsupportedModelError
from qvit.families import swin
from qvit.layers.points import quantization_points
from qvit.spec import ModelSpec, PerToken
from tests.engines.cases import SWINS

NAME = "swin_tiny_patch4_window7_224"
Factory = Callable[..., Any]


def check_round_trip(model: Any) -> SwinArchitecture:
    """describe -> JSON -> build gives a model with the same parameters' names and shapes, and the same function."""
    swin.check(model)
    described = swin.describe(model)
    architecture = SwinArchitecture.from_dict(json.loads(json.dumps(described.to_dict())))
    assert architecture == described
    built: Any = build(architecture).eval()
    built.load_state_dict(model.state_dict())
    x = torch.randn(2, architecture.in_chans, *architecture.img_size)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(built(x), want, rtol=1e-5, atol=1e-5)
        tokens = swin.stem(model, x)
        assert tokens.shape == (2, *architecture.grid, architecture.embed_dim)
        for stage, (merging, blocks) in enumerate(swin.stages(model)):
            assert (merging is None) == (stage == 0)
            tokens = tokens if merging is None else merging(tokens)
            assert tokens.shape == (2, *architecture.map(stage), architecture.width(stage))
            for block in blocks:
                middle = swin.after_attention(block, tokens)
                tokens = block(tokens)
                torch.testing.assert_close(middle + block.mlp(block.norm2(middle)), tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(swin.tail(model, tokens), want, rtol=1e-5, atol=1e-5)
    assert swin.describe(built) == architecture
    return architecture


@pytest.mark.parametrize("options", SWINS.values(), ids=SWINS.keys())
def test_shapes(options: dict[str, Any], small_swin: Factory) -> None:
    check_round_trip(small_swin(**options))


def test_options_that_change_nothing_at_inference(small_swin: Factory) -> None:
    options = {"drop_path_rate": 0.3, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "drop_rate": 0.1}
    check_round_trip(small_swin(**options, norm_layer=timm.layers.LayerNorm, always_partition=False))


@pytest.mark.parametrize(
    ("size", "width", "depths"), [("tiny", 96, (2, 2, 6, 2)), ("small", 96, (2, 2, 18, 2)), ("base", 128, (2, 2, 18, 2))]
)
def test_the_published_sizes(size: str, width: int, depths: tuple[int, ...]) -> None:
    with torch.device("meta"):  # no weights are needed
        model: Any = timm.create_model(f"swin_{size}_patch4_window7_224")
    a = swin.describe(model)
    assert (a.name, a.embed_dim, a.depths) == (f"swin_{size}_patch4_window7_224", width, depths)
    assert [a.head_dim(stage) for stage in range(4)] == [32] * 4
    assert a.windows == ((7, 7),) * 4
    assert a.mlp_hidden == tuple(4 * width << stage for stage in range(4))
    assert (a.img_size, a.patch_size, a.num_classes, a.norm_eps) == ((224, 224), (4, 4), 1000, 1e-5)
    shifts = [tuple(block.shift_size) for layer in model.layers for block in layer.blocks]
    assert shifts == [a.shift(stage, index) for stage, depth in enumerate(depths) for index in range(depth)]
    assert shifts[-1] == (0, 0)  # the last map is one window


def test_other_windows_of_timm() -> None:
    """Names whose stages have windows of different sizes."""
    model = timm.create_model("swin_s3_tiny_224", depths=(1, 1, 2, 1), embed_dim=24, num_heads=(3, 3, 3, 3))
    swin.check(model)
    a = swin.describe(model)
    assert a.windows == ((7, 7), (7, 7), (14, 14), (7, 7))
    assert swin.describe(build(a)) == a


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
def test_version_2_is_refused_by_name(name: str) -> None:
    model = timm.create_model(name, depths=(1, 1, 1, 1), embed_dim=24, num_heads=(3, 3, 3, 3))
    with pytest.raises(UnsupportedModelError, match=r"SwinTransformerV2\w* is not supported: it has cosine attention") as error:
        quantize(model, bits=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"img_size": 96}, r"layers\.0 has a map of 24 x 24 tokens, which windows of 7 x 7 do not divide.* multiple of 224"),
        ({"img_size": 28}, r"layers\.1\.downsample halves a map of 7 x 7 tokens, whose sides are not even.* multiple of 224"),
        ({"img_size": (224, 240)}, r"56 x 60 tokens.* height that is a multiple of 224 and a width that is a multiple of 224"),
        ({"img_size": 84, "window_size": (3, 6), "depths": (1, 1)}, r"multiple of 24 and a width that is a multiple of 48"),
    ],
)
def test_sizes_that_timm_would_pad_are_refused_with_those_that_fit(options: dict[str, Any], words: str) -> None:
    arguments = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (3, 3, 3, 3)} | options
    arguments["num_heads"] = (3,) * len(arguments["depths"])
    model = timm.create_model(NAME, **arguments)
    with pytest.raises(UnsupportedModelError, match=words) as error:
        quantize(model, bits=4)
    assert "\n" not in str(error.value)


def test_a_map_smaller_than_the_windows_is_one_window() -> None:
    model: Any = timm.create_model(NAME, img_size=(56, 24), depths=(1, 1), embed_dim=24, num_heads=(3, 3), window_size=(7, 6))
    swin.check(model)
    assert swin.describe(model).windows == ((7, 6), (7, 3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_pool": "max"}, "global_pool='max'"),
        ({"global_pool": ""}, "global_pool=''"),
        ({"num_classes": 0}, "no classification head"),
        ({"dynamic_img_size": True}, "dynamic_img_size"),
        ({"strict_img_size": False}, "dynamic_img_size"),
        (
            {"always_partition": True, "depths": (2, 2)},
            r"layers\.1\.blocks\.1 shifts its windows by \(2, 2\).*always_partition",
        ),
        ({"depths": (1, 0)}, r"layers\.1 has no blocks"),
        ({"head_dim": 16}, r"layers\.0\.blocks\.0\.attn\.qkv"),
        ({"norm_layer": nn.BatchNorm1d}, "BatchNorm1d"),
        ({"norm_layer": lambda c, **kw: nn.LayerNorm(c, bias=False)}, "without weight and bias"),
    ],
)
def test_unsupported_options_are_named(options: dict[str, Any], words: str, small_swin: Factory) -> None:
    with pytest.raises(UnsupportedModelError, match=words) as error:
        quantize(small_swin(**options), bits=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("where", "replacement", "words"),
    [
        ("layers.0.blocks.0.mlp.fc1", nn.Linear(16, 64), None),
        ("layers.0.blocks.0.mlp.act", nn.ReLU(), r"mlp\.act \(ReLU\)"),
        ("layers.0.blocks.0.mlp.act", nn.GELU(approximate="tanh"), r"mlp\.act \(tanh-GELU\)"),
        ("layers.0.blocks.1.mlp.fc1", nn.Linear(16, 64, bias=False), r"layers\.0\.blocks\.1\.mlp\.fc1"),
        ("layers.0.blocks.1.norm1", nn.LayerNorm(16, eps=1e-3), r"layers\.0\.blocks\.1\.norm1"),
        ("layers.0.blocks.1.norm1", nn.Identity(), r"layers\.0\.blocks\.1\.norm1"),
        ("layers.1.downsample", nn.Identity(), r"layers\.1\.downsample"),
        ("layers.1.downsample.reduction", nn.Linear(64, 32), r"layers\.1\.downsample\.reduction"),
        ("layers.0.blocks.0.attn", nn.MultiheadAttention(16, 2), r"layers\.0\.blocks\.0\.attn"),
        ("patch_embed.norm", nn.Identity(), r"patch_embed\.norm"),
        ("patch_embed.proj", nn.Conv2d(3, 16, 4, stride=2), r"patch_embed\.proj"),
        ("patch_embed.proj", nn.Conv2d(3, 16, 4, stride=4, bias=False), r"patch_embed\.proj"),
        ("head.fc", nn.Sequential(nn.Linear(32, 5)), r"no classification head"),
        ("head.drop", nn.Tanh(), r"head\.drop"),
        ("norm", nn.LayerNorm(32, eps=1e-3), "norm"),
    ],
)
def test_models_changed_by_hand(where: str, replacement: nn.Module, words: str | None, small_swin: Factory) -> None:
    """What `describe` reads off the first block must hold for all, or the rebuilt model would compute something else."""
    model = small_swin()
    parent, _, child = where.rpartition(".")
    setattr(model.get_submodule(parent), child, replacement)
    if words is None:
        check_round_trip(model)
        return
    with pytest.raises(UnsupportedModelError, match=words) as error:
        quantize(model, bits=4)
    assert "\n" not in str(error.value)


def test_subclasses_are_not_taken_for_their_parents() -> None:
    class MySwin(SwinTransformer):
        pass

    with pytest.raises(UnsupportedModelError, match="MySwin"):
        quantize(MySwin(img_size=32, window_size=4, embed_dim=16, depths=(1,), num_heads=(2,)), bits=4)


def test_points_have_timms_names_and_the_edges_8_bits(small_swin: Factory) -> None:
    points = quantization_points(quantize(small_swin(), bits=3))
    per_block = ["qkv.weight", "qkv.input", "q", "k", "v", "map", "proj.weight", "proj.input"]
    blocks = [f"layers.{stage}.blocks.{index}" for stage, index in ((0, 0), (0, 1), (1, 0))]
    expected = {f"{block}.attn.{part}" for block in blocks for part in per_block}
    expected |= {f"{b}.mlp.{layer}.{part}" for b in blocks for layer in ("fc1", "fc2") for part in ("weight", "input")}
    edges = {f"{layer}.{part}" for layer in ("patch_embed.proj", "head.fc") for part in ("weight", "input")}
    expected |= edges | {f"layers.1.downsample.reduction.{part}" for part in ("weight", "input")}
    assert set(points) == expected
    assert {name: point.spec.bits for name, point in points.items()} == {n: 8 if n in edges else 3 for n in expected}


@pytest.mark.parametrize(
    "point", ["layers.0.blocks.0.attn.q", "*.map", "*.mlp.fc1.input", "layers.1.downsample.reduction.input"]
)
def test_scales_a_token_are_refused(point: str, small_swin: Factory) -> None:
    with pytest.raises(SpecError, match="a scale per token is refused in a Swin Transformer") as error:
        quantize(small_swin(), spec=ModelSpec(overrides={point: {"scale": PerToken()}}))
    assert "\n" not in str(error.value)


def test_the_float_model_is_left_as_it_is(small_swin: Factory) -> None:
    model = small_swin()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    student = quantize(model, bits=4)
    assert dataclasses.asdict(student.qvit.architecture) == dataclasses.asdict(swin.describe(model))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert {id(p) for p in model.parameters()}.isdisjoint({id(p) for p in student.parameters()})
