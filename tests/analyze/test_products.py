"""The list of products against timm's modules as they run, and against formulas derived by hand."""

from __future__ import annotations

from typing import Any

import pytest

from qvit.analyze.products import LINEAR, SCORES, VALUES, has_mixed_widths, other_parameters, products_of, specs_of
from qvit.errors import SpecError, UnsupportedModelError
from qvit.families import vit
from qvit.spec import ModelSpec

from .shapes import counted, swin_shape, timm_model


def _listed(architecture: Any) -> dict[str, int]:
    return {product.name: product.multiplies for product in products_of(architecture)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_patch16_224", {}),
        ("deit_small_patch16_224", {}),
        ("deit_base_patch16_224", {}),
        ("deit_small_distilled_patch16_224", {}),
        ("vit_tiny_patch16_224", {"img_size": (48, 80), "patch_size": 12, "in_chans": 1, "num_classes": 3, "mlp_ratio": 2.5}),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 98, "num_classes": 5}),
    ],
)
def test_vit_as_timm_runs_it(name: str, options: dict[str, Any]) -> None:
    model = timm_model(name, **options)
    a = vit.describe(model)
    assert _listed(a) == counted(model, (a.in_chans, *a.img_size))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("swin_tiny_patch4_window7_224", {}),
        ("swin_small_patch4_window7_224", {}),
        (
            "swin_tiny_patch4_window7_224",
            {
                "img_size": (48, 96),
                "window_size": 3,
                "embed_dim": 24,
                "depths": (1, 2, 1),
                "num_heads": (2, 4, 8),
                "num_classes": 11,
                "mlp_ratio": 3,
            },
        ),
        # Windows as large as the map.
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "window_size": 8, "embed_dim": 32, "depths": (2, 1), "num_heads": (2, 2)},
        ),
    ],
)
def test_swin_as_timm_runs_it(name: str, options: dict[str, Any]) -> None:
    model = timm_model(name, **options)
    shape = swin_shape(model)
    assert _listed(shape) == counted(model, (3, *shape.img_size))
    products = products_of(shape)
    weights = sum(p.weights + p.bias * p.columns for p in products)
    assert weights + other_parameters(shape) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "depth"), [("tiny", 6), ("small", 18)])
def test_swin_by_hand(name: str, depth: int) -> None:
    products = products_of(swin_shape(timm_model(f"swin_{name}_patch4_window7_224")))
    c, n, window = 96, 56 * 56, 49
    total = n * 48 * c
    for stage, blocks in enumerate((2, 2, depth, 2)):
        if stage:
            # Patch merging: a quarter of the tokens, 4 C of them -> 2 C.
            total += n // 4 * (4 * c) * (2 * c)
            n, c = n // 4, 2 * c
        # qkv 3 C^2, proj C^2, MLP 8 C^2 a token; q k^T and map v: 2 x 49 C a token.
        total += blocks * n * (12 * c * c + 2 * window * c)
    total += 768 * 1000
    assert sum(product.multiplies for product in products) == total
    # timm's table: 4.51 and 8.77 GMACs, with a few small operations more.
    assert total / 1e9 == pytest.approx({"tiny": 4.5, "small": 8.75}[name], rel=0.01)


def test_shapes_points_and_traffic() -> None:
    a = vit.describe(timm_model("deit_small_patch16_224", depth=2))
    products = {product.name: product for product in products_of(a)}
    n, c = 197, 384
    scores, values = products["blocks.1.attn.scores"], products["blocks.1.attn.values"]
    assert (scores.kind, scores.shape, scores.points) == (SCORES, (6, n, 64), ("blocks.1.attn.q", "blocks.1.attn.k"))
    assert (values.kind, values.shape, values.points) == (VALUES, (6, n, 64), ("blocks.1.attn.map", "blocks.1.attn.v"))
    qkv = products["blocks.0.attn.qkv"]
    assert (qkv.kind, qkv.shape, qkv.weights, qkv.edge) == (LINEAR, (3 * c, c), 3 * c * c, False)
    assert qkv.points == ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.input")
    assert (products["patch_embed.proj"].edge, products["head"].edge) == (True, True)
    # qkv is written and read, the attention's output too, fc1's codes too: 3 + 3 + 1 + 1 + 4 + 4; the stream is read by both
    # LayerNorms, and read and written by both additions: 6.
    block = [product for name, product in products.items() if name.startswith("blocks.0")]
    assert sum(product.codes for product in block) == 16 * n * c
    assert sum(product.floats for product in block) == 6 * n * c


def test_windows_count_as_heads_do() -> None:
    shape = swin_shape(timm_model("swin_tiny_patch4_window7_224"))
    scores = next(p for p in products_of(shape) if p.name == "layers.1.blocks.0.attn.scores")
    assert scores.shape == (6 * 16, 49, 32)
    assert scores.points == ("layers.1.blocks.0.attn.q", "layers.1.blocks.0.attn.k")


def test_specs_follow_the_rules_of_the_model_spec() -> None:
    shape = swin_shape(timm_model("swin_tiny_patch4_window7_224"))
    products = products_of(shape)
    specs = specs_of(products, ModelSpec(weight_bits=2, act_bits=3, overrides={"layers.0.blocks.1.attn.[qkv]": 5, "*.fc2": 4}))
    assert specs["patch_embed.proj.weight"].bits == specs["head.fc.input"].bits == 8
    assert (specs["layers.2.downsample.reduction.weight"].bits, specs["layers.0.blocks.1.attn.map"].bits) == (2, 3)
    assert (specs["layers.0.blocks.1.attn.k"].bits, specs["layers.0.blocks.1.attn.qkv.input"].bits) == (5, 3)
    assert (specs["layers.3.blocks.0.mlp.fc2.weight"].bits, specs["layers.3.blocks.0.mlp.fc2.input"].bits) == (4, 4)
    with pytest.raises(SpecError, match=r"'\*\.fc3' matches no layer"):
        specs_of(products, ModelSpec(overrides={"*.fc3": 4}))


def test_another_family() -> None:
    with pytest.raises(UnsupportedModelError, match="ViT, DeiT and Swin"):
        products_of(object())


@pytest.mark.parametrize(
    ("spec", "mixed"),
    [
        (ModelSpec(), False),
        (ModelSpec(weight_bits=2, act_bits=4), False),
        (ModelSpec(weight_bits=8, act_bits=8), False),
        (ModelSpec(weight_bits=3, act_bits=3, overrides={"blocks.1.mlp.fc2": 4}), True),
        (ModelSpec(weight_bits=3, act_bits=3, overrides={"blocks.1.attn.map": 8}), True),
        (ModelSpec(weight_bits=3, act_bits=3, overrides={"blocks.1.mlp.fc2": 3, "head": 4}), False),
    ],
)
def test_mixed_widths_are_those_between_the_first_and_the_last_layer(spec: ModelSpec, mixed: bool) -> None:
    a = vit.describe(timm_model("deit_tiny_patch16_224", depth=2))
    assert has_mixed_widths(a, specs_of(products_of(a), spec)) is mixed
