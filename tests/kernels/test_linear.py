"""The fused linear layer against the quantizer, the activation and the product written out in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qvit.quantizers.lsq import lsq_quantize
from qvit.spec import Operand, PerChannel, PerTensor, QuantSpec

from .helpers import close, compare

ACTIVATIONS: dict[str, Any] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize(
    ("shape", "rows", "bits"), [((2, 17, 23), 5, 2), ((3, 131), 7, 4), ((1, 300, 129), 64, 3), ((1, 1, 1), 1, 8)]
)
def test_equals_the_plain_layer(kind: str, shape: tuple[int, ...], rows: int, bits: int, device: torch.device) -> None:
    from qvit.kernels.linear import quantized_linear

    spec = QuantSpec(bits, False, PerTensor(), PerChannel(), Operand.INPUT)
    columns = shape[-1]
    arguments = [
        2 * torch.randn(shape),
        torch.rand(1) * 3 / spec.qp + 1 / spec.qp,
        torch.randn(columns) - 1.5,
        torch.randn(rows, columns),
        torch.randn(rows),
    ]

    def fused(x, scale, offset, weight, bias):  # type: ignore[no-untyped-def]
        return quantized_linear(x, scale, offset, weight, bias, spec.qn, spec.qp, kind, torch.float32)

    def plain(x, scale, offset, weight, bias):  # type: ignore[no-untyped-def]
        return F.linear(lsq_quantize(ACTIVATIONS[kind](x), scale, offset, spec).value, weight, bias)

    compare(fused, plain, arguments, device)


def test_signed_codes_without_bias(device: torch.device) -> None:
    from qvit.kernels.linear import quantized_linear

    spec = QuantSpec(3, True, PerTensor(), None, Operand.INPUT)
    arguments = [torch.randn(4, 33), torch.tensor([0.4]), torch.randn(6, 33)]
    compare(
        lambda x, s, w: quantized_linear(
            x, s, torch.zeros(33, device=device), w, None, spec.qn, spec.qp, "none", torch.float32
        ),
        lambda x, s, w: F.linear(lsq_quantize(x, s, None, spec).value, w),
        arguments,
        device,
    )


def test_codes_are_exact_operands_in_bfloat16(device: torch.device) -> None:
    """With scale 1, no offset and whole weights nothing is rounded but the result."""
    from qvit.kernels.linear import quantized_linear

    x = torch.randint(0, 256, (5, 40), device=device).float()
    w = torch.randint(-1, 2, (8, 40), device=device).float()
    one, zero = torch.ones(1, device=device), torch.zeros(40, device=device)
    got = quantized_linear(x, one, zero, w, None, 0, 255, "none", torch.bfloat16)
    assert got.dtype == torch.bfloat16
    close(got, (x.double() @ w.double().t()).bfloat16(), 1e-9)
