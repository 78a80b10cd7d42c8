"""Multiplies, parameters and bytes of the paper's models against formulas and published counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qvit.analyze.cost import ModelCost, model_cost
from qvit.analyze.products import LINEAR, products_of, specs_of
from qvit.analyze.roofline import HARDWARE, estimate
from qvit.architecture import VitArchitecture
from qvit.convert import quantize
from qvit.errors import SpecError
from qvit.families import vit
from qvit.integer.model import IntegerModel
from qvit.layers.points import quantization_points
from qvit.spec import ModelSpec, Operand, QuantSpec

from .shapes import swin_shape, timm_model


def _architecture(name: str) -> tuple[VitArchitecture, torch.nn.Module]:
    model = timm_model(name)
    return vit.describe(model), model


def _specs(a: VitArchitecture, spec: ModelSpec) -> dict[str, QuantSpec]:
    """The specs of all points, from the naming rules alone."""
    layers = {"patch_embed.proj": True, **dict.fromkeys(a.heads, True)}
    specs = {}
    for index in range(a.depth):
        block = f"blocks.{index}"
        layers |= {f"{block}.{name}": False for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
        for name, operand in (("q", "QUERY"), ("k", "KEY"), ("v", "VALUE"), ("map", "MAP")):
            specs[f"{block}.attn.{name}"] = spec.resolve(f"{block}.attn.{name}", Operand[operand])
    for name, edge in layers.items():
        specs[f"{name}.weight"] = spec.resolve(f"{name}.weight", Operand.WEIGHT, edge)
        specs[f"{name}.input"] = spec.resolve(f"{name}.input", Operand.INPUT, edge)
    return specs


def _cost(name: str, **fields: Any) -> ModelCost:
    a, _ = _architecture(name)
    specs = _specs(a, ModelSpec(**fields))
    assert specs_of(products_of(a), ModelSpec(**fields)) == specs
    return model_cost(a, specs)


@pytest.mark.parametrize(("name", "c", "heads"), [("tiny", 192, 3), ("small", 384, 6), ("base", 768, 12)])
@pytest.mark.parametrize("distilled", [False, True])
def test_deit_multiplies_by_hand(name: str, c: int, heads: int, distilled: bool) -> None:
    cost = _cost(f"deit_{name}_distilled_patch16_224" if distilled else f"deit_{name}_patch16_224", weight_bits=4, act_bits=4)
    n = 198 if distilled else 197
    edge = 196 * (3 * 16 * 16) * c + (2 if distilled else 1) * c * 1000
    # qkv 3C^2, proj C^2, fc1 and fc2 4C^2 each: 12 C^2 a token; q k^T and map v: 2 N C a token.
    inner = 12 * n * (12 * c * c + 2 * n * c)
    assert cost.multiplies == edge + inner
    assert cost.multiplies_by_bits == {4: inner, 8: edge}
    assert cost.bit_operations == 16 * inner + 64 * edge
    assert cost.speed_up == pytest.approx((edge + inner) / (inner * 4 / 32 + edge * 8 / 32), rel=1e-12)
    assert cost.weight_bytes == 12 * 12 * c * c // 2 + 3 * 16 * 16 * c + (2 if distilled else 1) * c * 1000
    product = next(p for p in cost.products if p.name == "blocks.0.attn.scores")
    assert product.shape == (heads, n, 64)
    assert product.multiplies == heads * n * n * 64


@pytest.mark.parametrize(
    ("name", "giga"), [("deit_tiny_patch16_224", 1.26), ("deit_small_patch16_224", 4.60), ("deit_base_patch16_224", 17.58)]
)
def test_deit_multiplies_as_published(name: str, giga: float) -> None:
    # timm's table of GMACs, which counts a few small operations more.
    assert _cost(name).multiplies / 1e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize(
    "name",
    [
        "deit_tiny_patch16_224",
        "deit_small_distilled_patch16_224",
        "deit_base_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_clip_224",
        "vit_base_patch16_siglip_gap_224",
    ],
)
def test_parameters_are_timms(name: str) -> None:
    model = timm_model(name, num_classes=10)
    try:
        vit.check(model)
    except Exception:  # a model that qvit does not quantize has nothing to count
        pytest.skip(f"{name} is not supported")
    a = vit.describe(model)
    assert model_cost(a, _specs(a, ModelSpec())).parameters == sum(p.numel() for p in model.parameters())


def test_the_wider_operand_decides() -> None:
    cost = _cost("deit_tiny_patch16_224", weight_bits=2, act_bits=4, overrides={"*.attn.map": 8, "*.attn.q": 3, "*.attn.k": 3})
    n, c = 197, 192
    edge = 196 * 768 * c + c * 1000
    assert cost.multiplies_by_bits == {3: 12 * n * n * c, 4: 12 * n * 12 * c * c, 8: edge + 12 * n * n * c}
    assert list(cost.multiplies_by_bits) == [3, 4, 8]
    product = next(p for p in cost.products if p.name == "blocks.3.mlp.fc1")
    assert (product.left.bits, product.right.bits, product.bits) == (2, 4, 4)
    assert product.bit_operations == 8 * product.multiplies
    scores, values, layers = 3 * 3, 8 * 4, 2 * 4
    assert cost.bit_operations == 12 * n * n * c * (scores + values) + 12 * n * 12 * c * c * layers + 64 * edge


@pytest.mark.parametrize(("name", "depth"), [("tiny", 6), ("small", 18)])
def test_swin_by_hand(name: str, depth: int) -> None:
    shape = swin_shape(timm_model(f"swin_{name}_patch4_window7_224"))
    cost = model_cost(shape, specs_of(products_of(shape), ModelSpec(weight_bits=3, act_bits=4)))
    layers = attention = weights = 0
    for stage, blocks in enumerate((2, 2, depth, 2)):
        c, n = 96 << stage, (56 >> stage) ** 2
        layers += blocks * n * 12 * c * c + (2 * n * c * c if stage else 0)
        attention += blocks * n * 2 * 49 * c
        weights += blocks * 12 * c * c + (2 * c * c if stage else 0)
    edge = 56 * 56 * 48 * 96 + 768 * 1000
    assert cost.multiplies_by_bits == {4: layers + attention, 8: edge}
    assert cost.speed_up == pytest.approx((layers + attention + edge) / ((layers + attention) / 8 + edge / 4), rel=1e-12)
    assert cost.bit_operations == 12 * layers + 16 * attention + 64 * edge
    assert cost.weight_bytes == weights * 3 // 8 + 48 * 96 + 768 * 1000
    # Published: 28.3 and 49.6 million parameters.
    assert cost.parameters / 1e6 == pytest.approx({"tiny": 28.3, "small": 49.6}[name], rel=0.005)


def test_eight_bits_everywhere_is_four_times() -> None:
    assert _cost("deit_small_patch16_224", weight_bits=8, act_bits=8).speed_up == 4.0


def test_of_a_frozen_model_and_of_a_student_it_is_the_same(frozen: IntegerModel, small_vit: Callable[..., Any]) -> None:
    cost = model_cost(frozen.architecture, frozen.specs)
    packed = sum(layer.weight.packed.nbytes for layer in frozen.linears())
    assert cost.weight_bytes == packed
    assert [p.name for p in cost.products if len(p.shape) == 2] == [layer.name for layer in frozen.linears()]
    assert [p.shape for p in cost.products if len(p.shape) == 2] == [layer.weight.shape for layer in frozen.linears()]
    student: Any = quantize(small_vit(), bits=4)
    specs = {name: q.spec for name, q in quantization_points(student).items()}
    assert model_cost(student.qvit.architecture, specs).multiplies > 0


def test_a_missing_spec_is_named() -> None:
    a, _ = _architecture("deit_tiny_patch16_224")
    specs = _specs(a, ModelSpec())
    del specs["blocks.7.attn.map"]
    with pytest.raises(SpecError, match=r"blocks.7.attn.map has no spec"):
        model_cost(a, specs)


PAPERS = {
    "DeiT-T": "deit_tiny_patch16_224",
    "DeiT-S": "deit_small_patch16_224",
    "DeiT-B": "deit_base_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "Swin-S": "swin_small_patch4_window7_224",
}


def test_the_table_of_the_papers_backbones() -> None:
    """`docs/cost-model.md` says what is counted today."""
    lines = (Path(__file__).parents[2] / "docs" / "cost-model.md").read_text().splitlines()
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [cells for cells in written if cells[0] in PAPERS]
    assert [cells[0] for cells in rows] == [name for name in PAPERS for _ in range(3)]
    shapes: dict[str, Any] = {
        name: swin_shape(timm_model(of)) if name.startswith("Swin") else _architecture(of)[0] for name, of in PAPERS.items()
    }
    cpu, gpu = HARDWARE["cpu"], HARDWARE["cuda"]
    for name, bits, *cells in rows:
        assert bits in ("4/4", "3/3", "2/2")
        cost = model_cost(shapes[name], specs_of(products_of(shapes[name]), ModelSpec.of_bits(int(bits[0]))))
        one, many = estimate(cost, cpu), estimate(cost, gpu, batch=256)
        attention = sum(product.multiplies for product in cost.products if product.product.kind != LINEAR)
        assert cells == [
            f"{cost.parameters / 1e6:.2f} M",
            f"{cost.weight_bytes / 1e6:.2f}",
            f"{cost.multiplies / 1e9:.3f} G",
            f"{100 * attention / cost.multiplies:.1f} %",
            f"{cost.bit_operations / 1e9:.1f} G",
            f"{cost.speed_up:.2f}",
            f"{1e3 * one.seconds:.1f} ({one.bound})",
            f"{many.images_per_s:,.0f} ({many.bound})",
        ], (name, bits)
