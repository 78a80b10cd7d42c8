"""Fused attention against softmax, quantizer and products written out in float64; odd numbers of tokens, poisoned outputs."""

from __future__ import annotations

import pytest
import torch

from qvit.quantizers.lsq import lsq_quantize
from qvit.spec import Operand, PerHead, QuantSpec

from .helpers import close


def attention_inputs(b: int, n: int, heads: int, dim: int, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (b, n, 3 * heads * dim)).float()
    columns = torch.empty(4, 3, heads, dim)
    columns[0, :2] = (torch.rand(2, heads, 1) * 0.3 + 0.3) * 4 / 2**bits
    columns[0, 2] = torch.rand(heads, dim) * 0.3 + 0.2
    columns[1] = torch.randn(3, heads, dim) * 0.2
    columns[1, 0] = columns[0, 0] / 2  # the half step of q, exact
    return codes, columns.view(4, -1), torch.rand(heads) * 2 / n / (2**bits - 1) * 3 + 1e-3


def _plain(codes, columns, map_scale, heads, bits):  # type: ignore[no-untyped-def]
    """The values as leaves, and the output."""
    b, n, width = codes.shape
    dim = width // (3 * heads)
    values = (codes.double() * columns[0].double() + columns[1].double()).requires_grad_()
    scale = map_scale.double().requires_grad_()
    q, k, v = values.reshape(b, n, 3, heads, dim).permute(2, 0, 3, 1, 4)
    spec = QuantSpec(bits, False, PerHead(), None, Operand.MAP)
    p = lsq_quantize((q @ k.transpose(-2, -1) * dim**-0.5).softmax(-1), scale[:, None, None], None, spec).value
    return values, scale, (p @ v).transpose(1, 2).reshape(b, n, heads * dim)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(
    ("b", "n", "heads", "dim"), [(2, 17, 3, 8), (1, 129, 2, 64), (2, 64, 1, 32), (1, 1, 1, 16), (1, 70, 1, 24)]
)
def test_equals_plain_attention(bits: int, b: int, n: int, heads: int, dim: int, device: torch.device) -> None:
    from qvit.kernels.attention import quantized_attention

    codes, columns, map_scale = attention_inputs(b, n, heads, dim, bits)
    values, scale, want = _plain(codes, columns, map_scale, heads, bits)
    leaves = [codes.to(device).requires_grad_(), map_scale.to(device).requires_grad_()]
    torch.full((b, n, heads * dim), float("nan"), device=device)  # poison for the allocator to hand out again
    got = quantized_attention(leaves[0], columns.to(device), leaves[1], heads, 2**bits - 1)
    # A probability within rounding of a threshold may fall on either side: a step of the map in a few rows.
    close(got, want.detach(), 2e-5, flips=2e-3)
    upstream = torch.randn(want.shape, dtype=torch.float64)
    got_grads = torch.autograd.grad(got, leaves, upstream.to(device, torch.float32))
    want_grads = torch.autograd.grad(want, [values, scale], upstream)
    close(got_grads[0], want_grads[0], 5e-5, flips=5e-3)
    close(got_grads[1], want_grads[1], 2e-3)


def test_bfloat16_codes_give_the_same_within_its_precision(device: torch.device) -> None:
    from qvit.kernels.attention import quantized_attention

    if device.type == "cpu":
        pytest.skip("needs a CUDA GPU: Triton's interpreter multiplies bfloat16 wrongly")
    codes, columns, map_scale = attention_inputs(2, 65, 2, 32, 3)
    _, _, want = _plain(codes, columns, map_scale, 2, 3)
    leaf = codes.to(device, torch.bfloat16).requires_grad_()
    got = quantized_attention(leaf, columns.to(device), map_scale.to(device), 2, 7)
    assert got.dtype == torch.bfloat16
    close(got.float(), want.detach(), 1e-2, flips=2e-3)
    got.float().sum().backward()
    assert torch.isfinite(leaf.grad).all()
