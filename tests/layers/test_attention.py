"""Quantized attention: timm's in float mode, a float64 computation of the dequantized values otherwise."""

from __future__ import annotations

import pytest
import torch
from timm.layers.attention import Attention
from torch import nn

from qvit.errors import NotCalibratedError, SpecError
from qvit.layers.attention import QuantAttention
from qvit.layers.points import float_mode, quantization_points
from qvit.layers.rectify import Rectify
from qvit.spec import ModelSpec, Operand

B, N, C, H = 2, 11, 24, 3
D = C // H


def attention(bits: int = 4, rectify: bool = True, **overrides) -> tuple[Attention, QuantAttention]:
    plain = Attention(C, num_heads=H, qkv_bias=True).eval()
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_(std=0.3)
    spec = ModelSpec.of_bits(bits, overrides=overrides)
    return plain, QuantAttention(plain, lambda suffix, operand: spec.resolve(suffix, operand), N, rectify).eval()


def calibrate(layer: QuantAttention, x: torch.Tensor, share: float = 1.0) -> None:
    """Scales that span this share of the values."""
    with torch.no_grad(), float_mode(layer):
        q, k, v = layer.rectified(x)
        probabilities = (q @ k.transpose(-2, -1) * layer.scale).softmax(-1)
        joined = (probabilities @ v).transpose(1, 2).flatten(2)
    seen = {"q": q, "k": k, "v": v, "map": probabilities, "qkv.input": x, "proj.input": joined}
    seen |= {"qkv.weight": layer.qkv.weight.detach(), "proj.weight": layer.proj.weight.detach()}
    for name, quantizer in quantization_points(layer).items():
        values, spec = seen[name], quantizer.spec
        low, high = values.amin() * share, values.amax() * share
        scale = (high - low) / (spec.qp - spec.qn) if spec.offset else values.abs().amax() * share / max(spec.qp, 1)
        offset = None if quantizer.offset is None else (low - scale * spec.qn).expand(quantizer.offset.shape)
        quantizer.set_parameters(scale.expand(quantizer.scale.shape), offset)


@pytest.mark.parametrize("fused", [True, False])
def test_float_mode_without_irm_is_timms_attention(fused: bool) -> None:
    plain, layer = attention(rectify=False)
    plain.fused_attn = fused
    x = torch.randn(B, N, C)
    with float_mode(layer):
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)
    assert layer.qkv.weight is plain.qkv.weight
    assert layer.proj.bias is plain.proj.bias


def test_float_mode_with_irm_rectifies_q_and_k_and_nothing_else() -> None:
    plain, layer = attention(rectify=True)
    with torch.no_grad():
        for irm in (layer.rectify_q, layer.rectify_k):
            irm.weight.normal_()
            irm.bias.normal_()
    x = torch.randn(B, N, C)
    q, k, v = plain.qkv(x).reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    assert isinstance(layer.rectify_q, Rectify)
    assert layer.rectify_q is not layer.rectify_k
    probabilities = (layer.rectify_q(q) @ layer.rectify_k(k).transpose(-2, -1) * D**-0.5).softmax(-1)
    want = plain.proj((probabilities @ v).transpose(1, 2).reshape(B, N, C))
    with float_mode(layer):
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rectify", [True, False])
def test_equals_float64_attention_of_the_dequantized_values(bits: int, rectify: bool) -> None:
    _, layer = attention(bits, rectify)
    x = torch.randn(B, N, C)
    calibrate(layer, x)
    values: dict[str, torch.Tensor] = {}
    for name, quantizer in quantization_points(layer).items():
        quantizer.register_forward_hook(lambda _m, _i, out, name=name: values.__setitem__(name, out.value.double()))
    got = layer(x)
    qkv = values["qkv.input"] @ values["qkv.weight"].t() + layer.qkv.bias.double()
    q, k, v = qkv.reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    # what entered the quantizers of q, k and v is the integer product's result (and IRM's, of q and k)
    q, k = layer.rectify_q(q.float()), layer.rectify_k(k.float())
    for name, t in (("q", q), ("k", k), ("v", v.float())):
        quantizer = getattr(layer, f"{name}_quantizer")
        step = quantizer.scale.amax().item()
        agree = (quantizer(t).value - values[name].float()).abs() < step / 2
        assert agree.float().mean() > 0.995  # a code next to a threshold may fall either way
    probabilities = (values["q"] @ values["k"].transpose(-2, -1) * D**-0.5).softmax(-1)
    step = layer.map_quantizer.scale.double()
    codes = (probabilities / step).round().clamp(0, 2**bits - 1)
    assert ((codes * step) - values["map"]).abs().lt(step / 2).double().mean() > 0.995
    joined = (values["map"] @ values["v"]).transpose(1, 2).reshape(B, N, C)
    scale, offset = layer.proj.input_quantizer.scale.double(), layer.proj.input_quantizer.offset.double()
    again = (((joined - offset) / scale).round().clamp(0, 2**bits - 1) * scale + offset - values["proj.input"]).abs()
    assert (again < scale / 2).double().mean() > 0.995
    want = values["proj.input"] @ values["proj.weight"].t() + layer.proj.bias.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_eight_bits_are_close_to_float() -> None:
    plain, layer = attention(8, rectify=False)
    x = torch.randn(B, N, C)
    calibrate(layer, x)
    assert (layer(x) - plain(x)).std() < 0.03 * plain(x).std()


def test_every_parameter_gets_a_gradient() -> None:
    _, layer = attention(3)
    x = torch.randn(B, N, C, requires_grad=True)
    calibrate(layer, x.detach(), share=0.6)  # what is clipped moves the offsets
    layer.train()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("quantized", [True, False])
def test_dropout_of_the_map_is_kept(quantized: bool) -> None:
    plain = Attention(C, num_heads=H, attn_drop=0.5)
    spec = ModelSpec()
    layer = QuantAttention(plain, lambda suffix, operand: spec.resolve(suffix, operand), N, False)
    x = torch.randn(B, N, C)
    calibrate(layer.eval(), x)
    for quantizer in quantization_points(layer).values():
        quantizer.enabled = quantized
    still = layer(x)
    assert torch.equal(still, layer(x))
    layer.train()
    assert not torch.equal(layer(x), still)


def test_masks_are_refused() -> None:
    _, layer = attention()
    x = torch.randn(B, N, C)
    for arguments in ({"attn_mask": torch.zeros(N, N)}, {"is_causal": True}):
        with pytest.raises(SpecError, match="mask"):
            layer(x, **arguments)


def test_uncalibrated_refuses() -> None:
    _, layer = attention()
    with pytest.raises(NotCalibratedError):
        layer(torch.randn(B, N, C))


def test_points_and_their_operands() -> None:
    _, layer = attention()
    operands = {name: quantizer.spec.operand for name, quantizer in quantization_points(layer).items()}
    assert operands == {
        "qkv.weight": Operand.WEIGHT,
        "qkv.input": Operand.INPUT,
        "q": Operand.QUERY,
        "k": Operand.KEY,
        "v": Operand.VALUE,
        "map": Operand.MAP,
        "proj.weight": Operand.WEIGHT,
        "proj.input": Operand.INPUT,
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {"q": {"scale": "per_token"}, "k": {"scale": "per_token", "offset": "per_head"}, "map": {"scale": "per_token"}},
        {"q": {"scale": "per_tensor", "offset": None}, "v": {"scale": "per_head", "offset": "half_step"}},
        {"qkv.input": {"scale": "per_token", "offset": None, "signed": True}, "proj": 8},
    ],
)
def test_other_granularities_run_and_train(overrides: dict) -> None:
    _, layer = attention(4, True, **overrides)
    x = torch.randn(B, N, C)
    calibrate(layer, x)
    out = layer(x)
    out.sum().backward()
    assert out.shape == (B, N, C)
    assert isinstance(layer, nn.Module)
    assert layer.q_quantizer.scale.grad is not None
