"""The fused quantizer of a weight against the plain one: the same codes, and gradients in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qvit.quantizers.lsq import SMALLEST_SCALE, lsq_quantize
from qvit.spec import HalfStep, Operand, PerChannel, PerTensor, QuantSpec

from .helpers import compare

FACTOR = 0.03


def weight_spec(bits: int, scale: Any, half: bool) -> QuantSpec:
    return QuantSpec(bits, True, scale, HalfStep() if half else None, Operand.WEIGHT)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("scale", [PerChannel(), PerTensor()])
@pytest.mark.parametrize(("rows", "columns", "bits"), [(5, 23, 2), (3, 1537, 4), (64, 129, 3), (1, 1, 8)])
def test_equals_the_plain_quantizer(half: bool, scale: Any, rows: int, columns: int, bits: int, device: torch.device) -> None:
    from qvit.kernels.weight_quantize import quantize_weight

    spec = weight_spec(bits, scale, half)
    scales = (torch.rand((rows, 1) if isinstance(scale, PerChannel) else (1,)) + 0.5) / max(spec.qp, 1)

    def fused(w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return quantize_weight(w, s, spec.qn, spec.qp, half, SMALLEST_SCALE, FACTOR, torch.float32)

    compare(fused, lambda w, s: lsq_quantize(w, s, None, spec, FACTOR).value, [torch.randn(rows, columns), scales], device)


@pytest.mark.parametrize("half", [False, True])
def test_codes_are_those_of_the_plain_quantizer(half: bool, device: torch.device) -> None:
    """Also where weights lie on thresholds, and in bfloat16."""
    from qvit.kernels.weight_quantize import quantize_weight

    spec = weight_spec(3, PerChannel(), half)
    scale = torch.rand(16, 1, device=device) + 0.1
    weight = torch.randint(-12, 13, (16, 200), device=device) * 0.5 * scale
    got = quantize_weight(weight, scale, spec.qn, spec.qp, half, SMALLEST_SCALE, 1.0, torch.float32)
    want = lsq_quantize(weight, scale, None, spec)
    assert torch.equal((got / scale - 0.5 * half).round(), want.codes)
    low = quantize_weight(weight, scale, spec.qn, spec.qp, half, SMALLEST_SCALE, 1.0, torch.bfloat16)
    torch.testing.assert_close(low, want.value.bfloat16(), rtol=2**-7, atol=0)


def test_a_scale_that_became_negative_comes_back(device: torch.device) -> None:
    from qvit.kernels.weight_quantize import quantize_weight

    scale = torch.full((2, 1), -1.0, device=device, requires_grad=True)
    weight = torch.randn(2, 40, device=device)
    value = quantize_weight(weight, scale, -2, 1, False, SMALLEST_SCALE, 1.0, torch.float32)
    assert value.abs().max() <= 2 * SMALLEST_SCALE
    (value * weight.sign()).sum().backward()
    assert scale.grad is not None
    assert (scale.grad > 0).all()
