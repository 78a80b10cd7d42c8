"""IRM against the paper's formula."""

from __future__ import annotations

import pytest
import torch

from qvit.layers.rectify import Rectify


def paper(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, eps: float) -> torch.Tensor:
    """Equation 2.19: (q - mu + beta) / (gamma * sqrt(var + eps)) over the head width, gamma and beta [H, D], in float64."""
    x, gamma, beta = x.double(), gamma.double()[None, :, None], beta.double()[None, :, None]
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (x - mean).square().sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean + beta) / (gamma * (variance + eps).sqrt())


@pytest.mark.parametrize("shape", [(2, 3, 197, 64), (1, 1, 1, 5), (2, 6, 7, 33)])
def test_without_shift_it_is_the_papers_formula(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 3 + 1
    irm = Rectify(shape[1], shape[3])
    gamma = torch.rand(shape[1], shape[3]) + 0.5
    with torch.no_grad():
        irm.weight.copy_(1 / gamma)
    torch.testing.assert_close(irm(x).double(), paper(x, gamma, torch.zeros_like(gamma), irm.eps), rtol=1e-4, atol=1e-5)


def test_the_shift_comes_after_the_division() -> None:
    x = torch.randn(2, 3, 7, 5)
    irm = Rectify(3, 5)
    with torch.no_grad():
        irm.bias.normal_()
        irm.weight.normal_()
    gamma = 1 / irm.weight.detach()
    want = paper(x, gamma, torch.zeros_like(gamma), irm.eps) + irm.bias.detach().double()[None, :, None]
    torch.testing.assert_close(irm(x).double(), want, rtol=1e-4, atol=1e-4)


def test_standardises_every_token_of_every_head() -> None:
    x = torch.randn(2, 3, 50, 16) * torch.linspace(0.1, 30, 50)[:, None] + 5
    y = Rectify(3, 16).standardise(x)
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 3, 50), rtol=0, atol=1e-4)
    torch.testing.assert_close(y.var(-1, unbiased=False), torch.ones(2, 3, 50), rtol=1e-2, atol=0)


def test_does_not_feel_the_scale_and_mean_of_a_token() -> None:
    x = torch.randn(1, 2, 9, 16)
    irm = Rectify(2, 16)
    torch.testing.assert_close(irm(7 * x + 3), irm(x), rtol=1e-3, atol=1e-3)


def test_float32_under_autocast_and_finite_on_constant_tokens() -> None:
    irm = Rectify(2, 16)
    x = torch.zeros(1, 2, 3, 16, requires_grad=True)
    y = irm(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()
    half = torch.randn(1, 2, 3, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = irm(half)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, irm(half.float()), rtol=1e-6, atol=1e-6)


def test_gradcheck() -> None:
    class Double(Rectify):
        def standardise(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.layer_norm(x, (x.shape[-1],), eps=self.eps)

    irm = Double(2, 5).double()
    x = torch.randn(1, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t, w, b: torch.func.functional_call(irm, {"weight": w, "bias": b}, t), (x, irm.weight, irm.bias)
    )
