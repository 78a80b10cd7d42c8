"""Device functions: rounding of halves, activations and their slopes against PyTorch's."""

from __future__ import annotations

import pytest
import torch

from .test_linear import ACTIVATIONS

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

from qvit.kernels.arithmetic import activation, activation_slope, round_half_even  # noqa: E402


@triton.jit
def _round(x_ptr, out_ptr, count, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, round_half_even(tl.load(x_ptr + i, mask=i < count, other=0.0)), mask=i < count)


@triton.jit
def _activate(x_ptr, out_ptr, slope_ptr, count, KIND: tl.constexpr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0)
    tl.store(out_ptr + i, activation(x, KIND), mask=i < count)
    tl.store(slope_ptr + i, activation_slope(x, KIND), mask=i < count)


def test_halves_go_to_the_even_number(device: torch.device) -> None:
    x = torch.cat([torch.arange(-40, 41) / 4, torch.tensor([254.5, 255.5, -4e6, 2.0**22 - 0.5])]).to(device)
    out = torch.full_like(x, float("nan"))
    _round[(1,)](x, out, len(x), SIZE=128)
    assert torch.equal(out, x.round())


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_and_slopes_are_pytorchs(kind: str, device: torch.device) -> None:
    x = torch.linspace(-9, 9, 401, device=device)
    out, slope = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    _activate[(1,)](x, out, slope, len(x), KIND=kind, SIZE=512)
    exact = x.double().requires_grad_()
    want = ACTIVATIONS[kind](exact)
    torch.testing.assert_close(out.double(), want.detach(), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(slope.double(), torch.autograd.grad(want.sum(), exact)[0], rtol=1e-5, atol=2e-6)
