"""The ViT family: which of timm's models it takes, what it refuses and why, description and rebuilding."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from qvit.architecture import VitArchitecture
from qvit.convert import quantize
from qvit.errors import UnsupportedModelError
from qvit.families import vit
from qvit.layers.points import float_mode

SMALL = {"depth": 1, "embed_dim": 48, "num_heads": 3, "num_classes": 5}


def tiny(name: str, **options) -> nn.Module:
    """The named model with one narrow block and an image of 2 x 3 patches."""
    patch = timm.create_model(name, **(SMALL | options)).patch_embed.patch_size
    return timm.create_model(name, **(SMALL | {"img_size": (2 * patch[0], 3 * patch[1])} | options)).eval()


def images_for(model: nn.Module) -> torch.Tensor:
    return torch.randn(2, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


def check_round_trip(model: nn.Module) -> VitArchitecture:
    """describe -> JSON -> build gives a model with the same parameters' names and shapes, and the same function."""
    vit.check(model)
    described = vit.describe(model)
    architecture = VitArchitecture.from_dict(json.loads(json.dumps(described.to_dict())))
    assert architecture == described
    built = vit.build(architecture).eval()
    assert type(built) is type(model)
    built.load_state_dict(model.state_dict())
    x = images_for(model)
    with torch.no_grad():
        torch.testing.assert_close(built(x), model(x), rtol=1e-5, atol=1e-5)
        tokens = vit.stem(model, x)
        assert tokens.shape == (2, architecture.num_tokens, architecture.embed_dim)
        torch.testing.assert_close(vit.tail(model, model.blocks(tokens)), model(x), rtol=1e-5, atol=1e-5)
    assert vit.describe(built) == architecture
    return architecture


def test_flexible_patches_are_taken_at_the_size_they_are_created_with() -> None:
    """Other names are swept in tests/benchmarks/test_make_backbones.py."""
    for name in timm.list_models("flexivit*"):
        assert check_round_trip(tiny(name)).name == name


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("distilled", ["", "_distilled"])
def test_deit_at_its_own_width(size: str, distilled: str) -> None:
    name = f"deit_{size}{distilled}_patch16_224"
    model = timm.create_model(name, depth=1)
    a = vit.describe(model)
    width, heads = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}[size]
    assert (a.name, a.embed_dim, a.num_heads, a.head_dim, a.mlp_hidden, a.depth) == (name, width, heads, 64, 4 * width, 1)
    assert (a.img_size, a.patch_size, a.num_patches, a.num_classes) == ((224, 224), (16, 16), 196, 1000)
    assert a.num_tokens == (198 if distilled else 197)
    assert a.heads == (("head", "head_dist") if distilled else ("head",))
    assert a.global_pool == "token"
    assert a.class_token
    assert a.dist_token == bool(distilled)
    assert (a.qkv_bias, a.proj_bias, a.patch_bias, a.layer_scale, a.activation, a.norm_eps) == (
        True,
        True,
        True,
        False,
        "gelu",
        1e-6,
    )


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"patch_size": 14, "img_size": 28}, {"patch_size": (14, 14), "num_patches": 4}),
        ({"patch_size": 32, "img_size": 64}, {"patch_size": (32, 32), "num_patches": 4}),
        ({"img_size": (32, 48)}, {"img_size": (32, 48), "num_patches": 6}),
        ({"patch_size": (8, 16), "img_size": 32}, {"patch_size": (8, 16), "num_patches": 8}),
        ({"img_size": 50}, {"num_patches": 9}),
        ({"init_values": 0.1}, {"layer_scale": True}),
        (
            {"class_token": False, "global_pool": "avg"},
            {"class_token": False, "global_pool": "avg", "fc_norm": True, "final_norm": False},
        ),
        ({"global_pool": "avg"}, {"class_token": True, "global_pool": "avg", "fc_norm": True}),
        ({"global_pool": "avg", "fc_norm": False}, {"global_pool": "avg", "fc_norm": False, "final_norm": True}),
        ({"global_pool": "token", "fc_norm": True}, {"fc_norm": True, "final_norm": False}),
        ({"global_pool": "avg", "pool_include_prefix": True}, {"pool_include_prefix": True}),
        ({"reg_tokens": 4}, {"reg_tokens": 4, "num_prefix_tokens": 5}),
        ({"no_embed_class": True}, {"no_embed_class": True}),
        ({"reg_tokens": 2, "no_embed_class": True}, {"no_embed_class": True, "num_prefix_tokens": 3}),
        ({"pos_embed": "none"}, {"pos_embed": False}),
        ({"pre_norm": True}, {"pre_norm": True, "patch_bias": False}),
        ({"qkv_bias": False}, {"qkv_bias": False}),
        ({"proj_bias": False}, {"proj_bias": False}),
        ({"final_norm": False}, {"final_norm": False, "fc_norm": False}),
        ({"mlp_ratio": 2.7}, {"mlp_hidden": 129}),
        ({"in_chans": 1}, {"in_chans": 1}),
        ({"in_chans": 4}, {"in_chans": 4}),
        ({"depth": 3}, {"depth": 3}),
        ({"embed_dim": 49, "num_heads": 7, "mlp_ratio": 103 / 49}, {"embed_dim": 49, "head_dim": 7}),
        ({"act_layer": "gelu_tanh"}, {"activation": "gelu_tanh"}),
        ({"act_layer": "quick_gelu"}, {"activation": "quick_gelu"}),
        ({"drop_path_rate": 0.1, "proj_drop_rate": 0.1, "patch_drop_rate": 0.5}, {}),
    ],
)
def test_options(small_vit, options: dict, facts: dict) -> None:
    model = small_vit("vit_tiny_patch16_224", **options)
    a = check_round_trip(model)
    assert {name: getattr(a, name) for name in facts} == facts


def test_distilled_with_options(small_vit) -> None:
    a = check_round_trip(small_vit("deit_tiny_distilled_patch16_224", init_values=0.1, patch_size=8, qkv_bias=False))
    assert a.dist_token
    assert a.layer_scale
    assert a.num_tokens == 38


@given(embed=st.integers(1, 2000), hidden=st.integers(1, 9000))
@example(embed=49, hidden=1)  # 49 * (1 / 49) < 1
def test_hidden_width_survives_timms_ratio(embed: int, hidden: int) -> None:
    """timm takes a ratio and truncates the product."""
    assert int(embed * vit.mlp_ratio(embed, hidden)) == hidden


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True}, r"blocks\.0\.attn\.q_norm"),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, r"blocks\.0\.attn\.norm"),
        ("vit_tiny_patch16_224", {"scale_mlp_norm": True}, r"blocks\.0\.mlp\.norm"),
        ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.SwiGLU}, r"blocks\.0\.mlp"),
        ("vit_tiny_patch16_224", {"mlp_layer": timm.layers.GluMlp}, r"blocks\.0\.mlp"),
        ("vit_tiny_patch16_224", {"norm_layer": timm.layers.RmsNorm}, "norm"),
        ("vit_tiny_patch16_224", {"act_layer": "relu"}, r"blocks\.0\.mlp\.act \(ReLU\)"),
        ("vit_tiny_patch16_224", {"act_layer": "silu"}, r"blocks\.0\.mlp\.act"),
        ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}, "attn_pool"),
        ("vit_tiny_patch16_224", {"global_pool": "max"}, "global_pool='max'"),
        ("vit_tiny_patch16_224", {"global_pool": "avgmax"}, "global_pool='avgmax'"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "global_pool=''"),
        ("vit_tiny_patch16_224", {"num_classes": 0}, "no classification head"),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True, "img_size": 40}, "dynamic_img_pad"),
        ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ResPostBlock}, r"blocks\.0 \(ResPostBlock\)"),
        (
            "vit_tiny_patch16_224",
            {"norm_layer": lambda c, **kw: nn.LayerNorm(c, elementwise_affine=False)},
            "without weight and bias",
        ),
        ("vit_tiny_patch16_224", {"norm_layer": lambda c, **kw: nn.LayerNorm(c, bias=False)}, "without weight and bias"),
        ("vit_tiny_patch16_224", {"norm_layer": nn.BatchNorm1d}, "BatchNorm1d"),
        ("vit_tiny_patch16_224", {"embed_norm_layer": nn.LayerNorm}, "norm"),
    ],
)
def test_unsupported_modules_are_named(name: str, options: dict, named: str) -> None:
    try:
        model = timm.create_model(name, **(SMALL | {"img_size": 32} | options))
    except TypeError:
        pytest.skip("this timm has no such option")
    with pytest.raises(UnsupportedModelError, match=named) as error:
        quantize(model, bits=4)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("swinv2_tiny_window8_256", {"depths": (1, 1, 1, 1), "embed_dim": 24}),
        ("resnet18", {}),
        ("vit_tiny_r_s16_p8_224", {"depth": 1}),
    ],
)
def test_other_models_are_named(name: str, options: dict) -> None:
    model = timm.create_model(name, **options)
    with pytest.raises(UnsupportedModelError, match=rf"{type(model).__name__}|HybridEmbed"):
        quantize(model, bits=4)


@pytest.mark.parametrize("options", [{"dynamic_img_size": True}, {"dynamic_img_size": True, "dynamic_img_pad": True}])
def test_a_student_has_one_size_where_its_model_took_many(small_vit, options: dict) -> None:
    """The same function at the size that the model was created with, from a state dict that both can read."""
    model = small_vit("vit_tiny_patch16_224", **options)
    student = quantize(model, bits=8)
    plain = small_vit("vit_tiny_patch16_224")
    plain.load_state_dict(model.state_dict())
    assert vit.describe(plain) == student.qvit.architecture
    x = images_for(model)
    with torch.no_grad(), float_mode(student):
        torch.testing.assert_close(vit.stem(student, x), vit.stem(plain, x))
    assert model.dynamic_img_size  # the given model stays as it is


def test_subclasses_are_not_taken_for_their_parents() -> None:
    class MyVit(VisionTransformer):
        pass

    model = MyVit(img_size=32, embed_dim=48, depth=1, num_heads=3)
    with pytest.raises(UnsupportedModelError, match="MyVit"):
        quantize(model, bits=4)


@pytest.mark.parametrize(
    ("where", "replacement", "named"),
    [
        ("blocks.0.mlp.fc1", nn.Linear(48, 192), None),
        ("patch_embed.proj", nn.Conv2d(3, 48, 16, stride=16, bias=False), None),
        ("blocks.0.mlp.fc1", nn.Bilinear(2, 2, 2), r"blocks\.0\.mlp\.fc1"),
        ("blocks.0.attn", nn.MultiheadAttention(48, 3), r"blocks\.0\.attn"),
        ("blocks.1.norm1", nn.LayerNorm(48, eps=1e-3), r"blocks\.1\.norm1"),
        ("blocks.1.mlp.act", nn.GELU(approximate="tanh"), r"blocks\.1\.mlp\.act"),
        ("blocks.1.mlp.fc1", nn.Linear(48, 192, bias=False), r"blocks\.1\.mlp\.fc1"),
        ("blocks.1.ls1", timm.layers.LayerScale(48), r"blocks\.1\.ls1"),
        ("norm", nn.LayerNorm(48, eps=1e-3), "norm"),
        ("patch_embed.proj", nn.Conv2d(3, 48, 16, stride=8), r"patch_embed\.proj"),
        ("head", nn.Sequential(nn.Linear(48, 7)), "head"),
        ("head_drop", nn.Tanh(), r"head_drop"),
    ],
)
def test_models_changed_by_hand(small_vit, where: str, replacement: nn.Module, named: str | None) -> None:
    """What `describe` reads off the first block must hold for all, or the rebuilt model would compute something else."""
    model = small_vit("vit_tiny_patch16_224")
    parent, _, child = where.rpartition(".")
    setattr(model.get_submodule(parent), child, replacement)
    if named is None:
        check_round_trip(model)
        return
    with pytest.raises(UnsupportedModelError, match=named):
        quantize(model, bits=4)
