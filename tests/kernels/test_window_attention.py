"""Fused attention within windows against bias, mask, softmax, quantizer and products written out in float64."""

from __future__ import annotations

import pytest
import torch

from qvit.quantizers.lsq import lsq_quantize
from qvit.spec import Operand, PerHead, QuantSpec

from .helpers import close
from .test_attention import attention_inputs


def _plain(codes, columns, map_scale, bias, mask, bits):  # type: ignore[no-untyped-def]
    """Leaves (values, map scale, bias), and the output."""
    b, n, width = codes.shape
    heads = len(bias)
    dim = width // (3 * heads)
    values = (codes.double() * columns[0].double() + columns[1].double()).requires_grad_()
    scale, own_bias = map_scale.double().requires_grad_(), bias.double().requires_grad_()
    q, k, v = values.reshape(b, n, 3, heads, dim).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * dim**-0.5 + own_bias
    if mask is not None:
        scores = scores + mask.double().repeat(b // len(mask), 1, 1)[:, None]
    spec = QuantSpec(bits, False, PerHead(), None, Operand.MAP)
    p = lsq_quantize(scores.softmax(-1), scale[:, None, None], None, spec).value
    return [values, scale, own_bias], (p @ v).transpose(1, 2).reshape(b, n, heads * dim)


@pytest.mark.parametrize("a_program", [1, 3])  # the second leaves a program with fewer windows
@pytest.mark.parametrize(
    ("images", "windows", "n", "heads", "dim", "bits", "masked"),
    [
        (2, 4, 49, 3, 8, 4, True),
        (5, 1, 49, 2, 32, 2, False),
        (2, 2, 64, 1, 24, 3, True),
        (4, 1, 6, 3, 4, 4, False),
        (1, 4, 17, 2, 5, 2, True),
        (1, 1, 1, 1, 16, 2, False),
    ],
)
def test_equals_plain_attention(
    a_program: int,
    images: int,
    windows: int,
    n: int,
    heads: int,
    dim: int,
    bits: int,
    masked: bool,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qvit.kernels import window_attention

    b = images * windows
    monkeypatch.setattr(window_attention, "_PROGRAMS", max(b * heads // a_program, 1))
    codes, columns, map_scale = attention_inputs(b, n, heads, dim, bits)
    bias = torch.randn(heads, n, n)
    mask = torch.where(torch.rand(windows, n, n) < 0.4, -100.0, 0.0) if masked else None
    want_leaves, want = _plain(codes, columns, map_scale, bias, mask, bits)
    leaves = [x.to(device).requires_grad_() for x in (codes, map_scale, bias)]
    torch.full((b, n, heads * dim), float("nan"), device=device)  # poison for the allocator to hand out again
    got = window_attention.quantized_window_attention(
        leaves[0], columns.to(device), leaves[1], leaves[2], None if mask is None else mask.to(device), 2**bits - 1
    )
    # A probability within rounding of a threshold may fall on either side: a step of the map in a few rows.
    close(got, want.detach(), 2e-5, flips=2e-3)
    upstream = torch.randn(want.shape, dtype=torch.float64)
    got_grads = torch.autograd.grad(got, leaves, upstream.to(device, torch.float32))
    want_grads = torch.autograd.grad(want, want_leaves, upstream)
    close(got_grads[0], want_grads[0], 5e-5, flips=5e-3)
    close(got_grads[1], want_grads[1], 2e-3)
    close(got_grads[2], want_grads[2], 5e-5, flips=5e-3)


def test_bfloat16_codes_give_the_same_within_its_precision(device: torch.device) -> None:
    from qvit.kernels.window_attention import quantized_window_attention

    if device.type == "cpu":
        pytest.skip("needs a CUDA GPU: Triton's interpreter multiplies bfloat16 wrongly")
    codes, columns, map_scale = attention_inputs(8, 49, 3, 32, 3)
    bias, mask = torch.randn(3, 49, 49), torch.where(torch.rand(4, 49, 49) < 0.4, -100.0, 0.0)
    want_leaves, want = _plain(codes, columns, map_scale, bias, mask, 3)
    leaf, own_bias = codes.to(device, torch.bfloat16).requires_grad_(), bias.to(device).requires_grad_()
    got = quantized_window_attention(leaf, columns.to(device), map_scale.to(device), own_bias, mask.to(device), 7)
    assert got.dtype == torch.bfloat16
    close(got.float(), want.detach(), 1e-2, flips=2e-3)
    upstream = torch.randn(want.shape).bfloat16()
    got_grads = torch.autograd.grad(got, [leaf, own_bias], upstream.to(device))
    want_grads = torch.autograd.grad(want, [want_leaves[0], want_leaves[2]], upstream.double())
    for g, w in zip(got_grads, want_grads, strict=True):
        close(g.float(), w, 3e-2, flips=5e-3)
