"""Float steps in float64: the nearest float32 wherever codes are compared, ordinary speed where gradients are wanted."""

from __future__ import annotations

import pytest
import torch
from timm.layers import LayerNorm, activations
from torch import nn
from torch.nn import functional as F

from qvit.layers.exact import MapAverage, exact, make_exact, softmax, standardise

_X = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)) * 3 + 1
_ACTIVATIONS = [nn.GELU(), nn.GELU(approximate="tanh"), activations.GELU(), activations.GELUTanh(), activations.QuickGELU()]


def test_exact_without_gradients_and_autocast_alone() -> None:
    assert not exact(_X)
    with torch.no_grad():
        assert exact(_X)
        assert not exact(_X.double())
        assert not exact(_X.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert not exact(_X)


@pytest.mark.parametrize("cls", [nn.LayerNorm, LayerNorm])
def test_layer_norm(cls: type) -> None:
    norm = cls(33, eps=1e-6)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    plain = norm(_X)
    model = nn.Sequential(norm)
    make_exact(model)
    assert isinstance(norm, cls)
    assert torch.equal(model(_X), plain)
    with torch.no_grad():
        y = model(_X)
    wanted = F.layer_norm(_X.double(), (33,), norm.weight.double(), norm.bias.double(), 1e-6).float()
    assert torch.equal(y, wanted)
    assert not torch.equal(y, plain)  # the last bits of float32 differ somewhere


@pytest.mark.parametrize("activation", _ACTIVATIONS, ids=lambda a: f"{type(a).__module__.split('.')[0]}-{a}")
def test_activations(activation: nn.Module) -> None:
    plain, wanted = activation(_X), activation(_X.double()).float()
    model = nn.Sequential(activation)
    make_exact(model)
    assert torch.equal(model(_X), plain)
    with torch.no_grad():
        assert torch.equal(model(_X), wanted)


def test_functions() -> None:
    assert torch.equal(softmax(_X), _X.softmax(-1))
    with torch.no_grad():
        assert torch.equal(softmax(_X), _X.double().softmax(-1).float())
        assert torch.equal(standardise(_X, 1e-6), F.layer_norm(_X.double(), (33,), eps=1e-6).float())


def test_the_average_over_a_map() -> None:
    x = torch.randn(3, 5, 7, 11) * 1000
    plain = MapAverage()(x)
    assert torch.equal(plain, x.mean((1, 2)))
    with torch.no_grad():
        got = MapAverage()(x)
    assert torch.equal(got, x.double().mean((1, 2)).float())
    assert got.dtype == torch.float32
