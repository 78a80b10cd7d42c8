"""The quantized MLP: timm's in float mode, and its layers one after the other otherwise."""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import nn

from qvit.layers.linear import QuantLinear
from qvit.layers.mlp import QuantMlp
from qvit.layers.points import float_mode, quantization_points
from qvit.spec import ModelSpec, Operand

N, C, HIDDEN = 5, 12, 20


def _pair(act: type[nn.Module] = nn.GELU) -> tuple[Mlp, QuantMlp]:
    plain = Mlp(C, HIDDEN, act_layer=act).eval()
    spec = ModelSpec.of_bits(4)

    def layer(linear: nn.Linear, name: str) -> QuantLinear:
        resolved = (spec.resolve(f"{name}.{end}", kind) for end, kind in (("weight", Operand.WEIGHT), ("input", Operand.INPUT)))
        return QuantLinear(linear, *resolved, N)

    return plain, QuantMlp(plain, layer(plain.fc1, "fc1"), layer(plain.fc2, "fc2"), "gelu").eval()


def test_float_mode_is_timms() -> None:
    plain, mlp = _pair()
    x = torch.randn(2, N, C)
    with float_mode(mlp):
        torch.testing.assert_close(mlp(x), plain(x), rtol=1e-5, atol=1e-6)
    assert next(iter(mlp.state_dict())) == "fc1.weight"
    assert mlp.fc1.weight is plain.fc1.weight


def test_quantized_it_is_its_layers_in_turn() -> None:
    _, mlp = _pair()
    for quantizer in quantization_points(mlp).values():
        quantizer.set_parameters(torch.full_like(quantizer.scale, 0.2))
    x = torch.randn(2, N, C)
    want = mlp.fc2(torch.nn.functional.gelu(mlp.fc1(x).double()).float())
    assert torch.equal(mlp(x), want)
    assert not torch.equal(mlp(x), mlp.fc2(mlp.fc1(x)))
