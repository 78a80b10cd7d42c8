"""QuantLinear: float mode, values and gradients end to end, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qvit.errors import NotCalibratedError, SpecError
from qvit.layers.linear import QuantLinear
from qvit.layers.points import float_mode, quantizing_only
from qvit.quantizers.lsq import LSQQuantizer
from qvit.spec import HalfStep, Operand, PerChannel, PerGroup, PerTensor, QuantSpec

WEIGHT = QuantSpec(3, True, PerChannel(), None, Operand.WEIGHT)
INPUT = QuantSpec(3, False, PerTensor(), PerChannel())


def calibrated(bias: bool = True, shape: tuple[int, int] = (13, 7), tokens: int | None = 5) -> QuantLinear:
    layer = QuantLinear(nn.Linear(*shape, bias=bias), WEIGHT, INPUT, tokens)
    # no value exactly on a clip edge, where float32 and float64 may fall to either side
    layer.weight_quantizer.set_parameters(layer.weight.detach().abs().amax(1) / 3.7)
    layer.input_quantizer.set_parameters(torch.tensor([0.6]), torch.randn(shape[0]) / 5 - 2)
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_takes_over_the_parameters_and_equals_the_linear_layer_in_float_mode(bias: bool) -> None:
    linear = nn.Linear(13, 7, bias=bias)
    layer = QuantLinear(linear, WEIGHT, INPUT, 5)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    x = torch.randn(2, 5, 13)
    with float_mode(layer):
        assert torch.equal(layer(x), linear(x))
    with pytest.raises(NotCalibratedError):
        layer(x)


@pytest.mark.parametrize("bias", [True, False])
def test_values_and_all_gradients_against_float64_with_straight_through_rounding(bias: bool) -> None:
    layer = calibrated(bias)
    x = torch.randn(2, 5, 13, requires_grad=True)
    upstream = torch.randn(2, 5, 7)

    def straight_through(t, scale, offset, low, high):  # type: ignore[no-untyped-def]
        v = ((t - offset) / scale).clamp(low, high)
        return (v + (v.round() - v).detach()) * scale + offset

    names = ["weight", "weight_quantizer.scale", "input_quantizer.scale", "input_quantizer.offset"] + (["bias"] if bias else [])
    double = {name: dict(layer.named_parameters())[name].detach().double().requires_grad_() for name in names}
    x64 = x.detach().double().requires_grad_()
    w = straight_through(double["weight"], double["weight_quantizer.scale"], 0.0, -4, 3)
    a = straight_through(x64, double["input_quantizer.scale"], double["input_quantizer.offset"], 0, 7)
    want = a @ w.t() + (double["bias"] if bias else 0)
    y = layer(x)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)

    y.backward(upstream)
    want_grads = torch.autograd.grad(want, [x64, *double.values()], upstream.double())
    factor = {
        "weight_quantizer.scale": layer.weight_quantizer.grad_factor,
        "input_quantizer.scale": layer.input_quantizer.grad_factor,
    }
    torch.testing.assert_close(x.grad.double(), want_grads[0], rtol=1e-4, atol=1e-5)
    for name, grad in zip(names, want_grads[1:], strict=True):
        got = dict(layer.named_parameters())[name].grad.double()
        torch.testing.assert_close(got, grad * factor.get(name, 1.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("statistical", [True, False])
def test_weights_alone_are_quantized_where_the_input_is_not(statistical: bool) -> None:
    weight = QuantSpec(3, True, PerChannel(), HalfStep() if statistical else None, Operand.WEIGHT)
    layer = QuantLinear(nn.Linear(13, 7), weight, INPUT, 5, statistical=statistical)
    if isinstance(layer.weight_quantizer, LSQQuantizer):
        layer.weight_quantizer.set_parameters(layer.weight.detach().abs().amax(1) / 3.7)
    x = torch.randn(2, 5, 13)
    with quantizing_only(layer, ("weight",)):
        rounded = layer.weight_quantizer(layer.weight).value
        assert torch.equal(layer(x), F.linear(x, rounded, layer.bias))
    assert len(rounded[0].unique()) <= 8


def test_high_bits_are_close_to_float() -> None:
    linear = nn.Linear(64, 32)
    layer = QuantLinear(linear, QuantSpec(8, True, PerChannel(), None, Operand.WEIGHT), QuantSpec(8, True), 5)
    layer.weight_quantizer.set_parameters(linear.weight.detach().abs().amax(1) / 127)
    x = torch.randn(2, 5, 64)
    layer.input_quantizer.set_parameters(x.abs().amax() / 127)
    assert (layer(x) - linear(x)).abs().max() < 0.03


def test_statistical_weights_have_no_scale_to_learn_and_all_gradients() -> None:
    half = QuantSpec(3, True, PerChannel(), HalfStep(), Operand.WEIGHT)
    layer = QuantLinear(nn.Linear(13, 7), half, INPUT, 5, statistical=True)
    layer.input_quantizer.set_parameters(torch.tensor([0.6]), torch.randn(13) / 5 - 2)
    assert set(dict(layer.named_parameters())) == {"weight", "bias", "input_quantizer.scale", "input_quantizer.offset"}
    x, upstream = torch.randn(2, 5, 13), torch.randn(2, 5, 7)
    layer(x).backward(upstream)
    source = layer.input_quantizer(x).value.detach()
    torch.testing.assert_close(layer.weight.grad, upstream.flatten(0, 1).t() @ source.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_groups_of_two_sizes_are_refused() -> None:
    weight, inputs = QuantSpec(4, True, PerGroup(64), None, Operand.WEIGHT), QuantSpec(4, False, PerGroup(128))
    with pytest.raises(SpecError, match="one size"):
        QuantLinear(nn.Linear(256, 8), weight, inputs, 5)
    QuantLinear(nn.Linear(256, 8), weight, QuantSpec(4, False, PerGroup(64)), 5)
    with pytest.raises(SpecError, match="groups of 64"):
        QuantLinear(nn.Linear(100, 8), weight, INPUT, 5)


def test_state_dict_names() -> None:
    assert set(calibrated().state_dict()) == {
        "weight",
        "bias",
        "weight_quantizer.scale",
        "weight_quantizer.calibrated",
        "input_quantizer.scale",
        "input_quantizer.offset",
        "input_quantizer.calibrated",
    }
