"""Roofline estimates against sums by hand; ceilings that are replaced."""

from __future__ import annotations

from typing import Any

import pytest

from qvit.analyze.cost import ModelCost, model_cost
from qvit.analyze.products import products_of, specs_of
from qvit.analyze.roofline import CPU, GPU, HARDWARE, ceiling_of, estimate, with_ceilings
from qvit.errors import InputError
from qvit.families import vit
from qvit.spec import ModelSpec

from .shapes import swin_shape, timm_model

N, C, EDGE = 197, 384, 196 * 768 * 384 + 384 * 1000
LINEAR, ATTENTION = 12 * N * 12 * C * C, 12 * 2 * N * N * C


def _cost(bits: int, **fields: Any) -> ModelCost:
    a = vit.describe(timm_model("deit_small_patch16_224"))
    return model_cost(a, specs_of(products_of(a), ModelSpec.of_bits(bits, **fields)))


@pytest.mark.parametrize(("bits", "rate"), [(2, 570e9), (3, 233e9 * 4 / 3), (4, 233e9 * 4 / 3), (8, 233e9)])
def test_multiplies_on_the_cpu(bits: int, rate: float) -> None:
    one, two = estimate(_cost(bits), CPU), estimate(_cost(bits), CPU, batch=3, threads=2)
    # The engine's attention runs on vpdpbusd whatever the width, and so do the first and the last layer at 8 bits.
    assert one.compute_seconds == pytest.approx(LINEAR / rate + (ATTENTION + EDGE) / 233e9, rel=1e-12)
    assert two.compute_seconds == pytest.approx(1.5 * one.compute_seconds, rel=1e-12)
    assert (one.bound, one.seconds) == ("multiplies", one.compute_seconds)
    assert two.images_per_s == pytest.approx(2 * one.images_per_s, rel=1e-12)


@pytest.mark.parametrize(("residual", "width"), [("float32", 4), ("float16", 2)])
def test_memory_on_the_gpu(residual: str, width: int) -> None:
    cost = _cost(4)
    # A block moves 16 C codes and 6 C values of the stream a token; pixels, the stream and the head beside it.
    image = 12 * (16 + 6 * width) * N * C + 196 * 768 + width * 196 * C + width * (C + 1000)
    for batch in (1, 256):
        result = estimate(cost, GPU, batch, residual=residual)
        assert result.bytes_moved == cost.weight_bytes + batch * image
        assert result.memory_seconds == pytest.approx(result.bytes_moved / 2.97e12, rel=1e-12)
        assert (result.bound, result.threads) == ("memory", 0)
        assert result.compute_seconds == pytest.approx(batch * cost.multiplies / (1970e12 / 2), rel=1e-12)
    assert estimate(cost, CPU, residual=residual) == estimate(cost, CPU)  # it rounds, but keeps 4 bytes
    two = estimate(_cost(2), GPU, 256)
    inner = LINEAR + ATTENTION
    assert two.compute_seconds == pytest.approx(256 * (inner / (15885e12 / 8) + EDGE / (1970e12 / 2)), rel=1e-12)


def test_mixed_widths_choose_product_by_product() -> None:
    cost = _cost(2, overrides={"*.mlp.fc1.weight": 4, "*.mlp.fc2": 8, "blocks.0.attn.qkv.input": 7})
    chosen = {product.name: ceiling_of(product, CPU).name for product in cost.products}
    assert chosen["blocks.3.mlp.fc1"] == "pairs"
    assert chosen["blocks.3.mlp.fc2"] == "vpdpbusd"
    assert (chosen["blocks.0.attn.qkv"], chosen["blocks.1.attn.qkv"]) == ("vpdpbusd", "table3")
    assert chosen["blocks.0.attn.scores"] == "vpdpbusd"
    assert {ceiling_of(p, GPU).name for p in cost.products if p.product.kind != "linear"} == {"b1"}


def test_swin_is_estimated_too() -> None:
    shape = swin_shape(timm_model("swin_tiny_patch4_window7_224"))
    cost = model_cost(shape, specs_of(products_of(shape), ModelSpec.of_bits(4)))
    for hardware in HARDWARE.values():
        result = estimate(cost, hardware, 8)
        assert result.seconds == max(result.compute_seconds, result.memory_seconds) > 0


def test_other_ceilings() -> None:
    cost = _cost(8)
    changed = with_ceilings([CPU, GPU], {"cpu.vpdpbusd": 466e9, "cuda.bandwidth": 2.97e11})
    assert estimate(cost, changed[0]).compute_seconds == pytest.approx(estimate(cost, CPU).compute_seconds / 2)
    assert estimate(cost, changed[1]).memory_seconds == pytest.approx(estimate(cost, GPU).memory_seconds * 10)
    assert estimate(cost, changed[0]).memory_seconds == estimate(cost, CPU).memory_seconds
    assert [c.source for c in changed[0].ceilings][-1] == "given"
    assert with_ceilings([CPU, GPU], {}) == [CPU, GPU]
    with pytest.raises(InputError, match=r"no ceiling 'cpu.amx': use one of cpu.table3, .*cuda.bandwidth"):
        with_ceilings([CPU, GPU], {"cpu.amx": 1e12})
    for value in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InputError, match="use a positive number"):
            with_ceilings([CPU], {"cpu.pairs": value})


def test_out_of_range() -> None:
    with pytest.raises(InputError, match="A batch of 0"):
        estimate(_cost(4), CPU, batch=0)
    with pytest.raises(InputError, match="0 threads"):
        estimate(_cost(4), CPU, threads=0)
