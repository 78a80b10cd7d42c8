"""Equalisation balances channels and changes nothing else."""

import pytest
import torch
from torch import nn

from qvit.calibration.equalise import equalise_norm, equalise_values, factors_of


def test_factors_are_the_square_root_of_the_spread_with_geometric_mean_one():
    x = torch.randn(50, 400, 4) * torch.tensor([0.25, 1.0, 4.0, 1.0])
    torch.testing.assert_close(factors_of(x), torch.tensor([0.5, 1.0, 2.0, 1.0]), rtol=0.03, atol=0)


def test_a_dead_channel_does_not_blow_up_the_weight():
    x = torch.randn(10, 20, 3)
    x[..., 1] = 0.7
    factors = factors_of(x)
    assert torch.isfinite(factors).all()
    assert factors.min() >= 1 / 32


def test_equalising_a_norm_keeps_the_product():
    norm, linear = nn.LayerNorm(5), nn.Linear(5, 7)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, r = torch.randn(3, 4, 5), torch.rand(5) + 0.5
    before, normed = linear(norm(x)), norm(x)
    equalise_norm(norm, linear, r)
    torch.testing.assert_close(linear(norm(x)), before)
    torch.testing.assert_close(norm(x), normed / r)


@pytest.mark.parametrize("bias", [True, False])
def test_equalising_values_keeps_attention(bias):
    width, tokens = 6, 5
    qkv, proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)
    x, attention, r = torch.randn(2, tokens, width), torch.randn(2, tokens, tokens).softmax(-1), torch.rand(width) + 0.5

    def output():
        return proj(attention @ qkv(x)[..., 2 * width :])

    before, q_and_k = output(), qkv(x)[..., : 2 * width]
    equalise_values(qkv, proj, r)
    torch.testing.assert_close(output(), before)
    assert torch.equal(qkv(x)[..., : 2 * width], q_and_k)
