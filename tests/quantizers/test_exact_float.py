"""The float steps that engines and students share: the float32 nearest to the value in wide arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qvit.quantizers import exact_float

_X = torch.randn(7, 65, generator=torch.Generator().manual_seed(0)) * 3 + 1


def test_layer_norm_and_standardise() -> None:
    weight, bias = torch.randn(65), torch.randn(65)
    x = _X.numpy().astype(np.longdouble)
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + np.longdouble(1e-6))
    assert (exact_float.standardise(_X, 1e-6).numpy() == z.astype(np.float32)).all()
    wanted = (z * weight.numpy() + bias.numpy()).astype(np.float32)
    assert (exact_float.layer_norm(_X, weight, bias, 1e-6).numpy() == wanted).all()


def test_softmax() -> None:
    e = np.exp(_X.numpy().astype(np.longdouble))
    assert (exact_float.softmax(_X).numpy() == (e / e.sum(-1, keepdims=True)).astype(np.float32)).all()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("quick_gelu", lambda x: x / (1 + math.exp(-1.702 * x))),
    ],
)
def test_activations(name: str, function: object) -> None:
    wanted = np.vectorize(function)(_X.numpy().astype(np.float64)).astype(np.float32)
    assert (exact_float.activation(_X, name).numpy() == wanted).all()
