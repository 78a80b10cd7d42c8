"""Quantized window attention against timm's, and against float64 on the dequantized values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention

from qvit.kernels import switch
from qvit.layers.points import float_mode, quantization_points
from qvit.layers.window_attention import QuantWindowAttention
from qvit.quantizers.lsq import LSQQuantizer
from qvit.quantizers.mse_search import mse_optimal
from qvit.spec import ModelSpec

H, D, WINDOW, C = 3, 4, (2, 3), 12
N = WINDOW[0] * WINDOW[1]
MAP = (4, 6)  # four windows
B = 2


def attention(bits: int = 4, rectify: bool = True, **options: Any) -> tuple[WindowAttention, QuantWindowAttention]:
    plain = WindowAttention(C, H, window_size=WINDOW, **options).eval()
    torch.nn.init.normal_(plain.relative_position_bias_table)
    spec = ModelSpec.of_bits(bits)
    layer = QuantWindowAttention(plain, lambda suffix, operand: spec.resolve(suffix, operand), rectify).eval()
    return plain, layer


def mask() -> torch.Tensor:
    block = SwinTransformerBlock(C, MAP, num_heads=H, window_size=WINDOW, shift_size=1, always_partition=True)
    assert block.attn_mask.shape == (4, N, N)
    return block.attn_mask


def calibrate(layer: QuantWindowAttention, x: torch.Tensor, given: torch.Tensor | None) -> None:
    samples: dict[LSQQuantizer, torch.Tensor] = {}
    quantizers = [q for q in quantization_points(layer).values() if isinstance(q, LSQQuantizer)]
    for quantizer in quantizers:
        quantizer.observer = lambda value, quantizer=quantizer: samples.__setitem__(quantizer, value)
    with torch.no_grad(), float_mode(layer):
        layer(x, given)
    for quantizer in quantizers:
        quantizer.observer = None
    for part in (layer.qkv, layer.proj):
        samples[part.weight_quantizer] = part.weight.detach()
    for quantizer, seen in samples.items():
        shape = None if quantizer.offset is None else tuple(quantizer.offset.shape)
        quantizer.set_parameters(*mse_optimal(seen, quantizer.spec, quantizer.scale.shape, shape))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_in_float_it_is_timms(masked: bool, fused: bool) -> None:
    plain, layer = attention(rectify=False)
    plain.fused_attn = fused
    x = torch.randn(4 * B, N, C)
    given = mask() if masked else None
    with torch.no_grad(), float_mode(layer):
        torch.testing.assert_close(layer(x, given), plain(x, given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_map_is_softmax_of_scores_plus_bias_plus_mask(bits: int, masked: bool) -> None:
    _, layer = attention(bits)
    x, given = torch.randn(4 * B, N, C), mask() if masked else None
    calibrate(layer, x, given)
    entered: dict[str, torch.Tensor] = {}
    layer.map_quantizer.register_forward_pre_hook(lambda _m, inputs: entered.__setitem__("map", inputs[0]))
    for name in ("q", "k"):
        quantizer = getattr(layer, f"{name}_quantizer")
        quantizer.register_forward_hook(lambda _m, _i, out, name=name: entered.__setitem__(name, out.value.double()))
    with torch.no_grad():
        layer(x, given)
    scores = entered["q"] @ entered["k"].transpose(-2, -1) * D**-0.5
    table = layer.relative_position_bias_table.detach().double()
    for n in range(N):
        for m in range(N):
            rows, columns = n // 3 - m // 3, n % 3 - m % 3
            scores[:, :, n, m] += table[(rows + 1) * 5 + columns + 2]
    if given is not None:
        scores = scores + given.double().repeat(B, 1, 1)[:, None]
    torch.testing.assert_close(entered["map"].double(), scores.softmax(-1), rtol=1e-5, atol=1e-6)
    if given is not None:
        assert entered["map"][given.repeat(B, 1, 1)[:, None].expand(-1, H, -1, -1) < 0].max() < 1e-20


def test_every_parameter_gets_a_gradient() -> None:
    _, layer = attention(3)
    x = torch.randn(4 * B, N, C, requires_grad=True)
    calibrate(layer, x.detach(), mask())
    with torch.no_grad():  # what is clipped moves the offsets
        for quantizer in quantization_points(layer).values():
            quantizer.scale.mul_(0.6)
    layer.train()
    layer(x, mask()).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_taps_are_q_and_k_of_every_window() -> None:
    _, layer = attention(3)
    x = torch.randn(4 * B, N, C)
    calibrate(layer, x, mask())
    taken: list[torch.Tensor] = []
    layer.tap = lambda q, k: taken.extend((q, k))
    with torch.no_grad():
        layer(x, mask())
    q, k, _ = layer.rectified(x)
    assert q.shape == (4 * B, H, N, D)
    torch.testing.assert_close(taken[0], q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(taken[1], k, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_dropout_of_the_map_is_kept(quantized: bool) -> None:
    _, layer = attention(attn_drop=0.5)
    x = torch.randn(4 * B, N, C)
    calibrate(layer, x, None)
    for quantizer in quantization_points(layer).values():
        quantizer.enabled = quantized
    still = layer(x)
    assert torch.equal(still, layer(x))
    layer.train()
    assert not torch.equal(layer(x), still)


def test_a_fused_step_is_the_plain_one(device: torch.device) -> None:
    _, layer = attention(4)
    x, given = torch.randn(4 * B, N, C), mask()
    calibrate(layer, x, given)
    upstream = torch.randn(4 * B, N, C).to(device)
    layer.train().to(device)
    results = []
    for fused in (False, True):
        layer.zero_grad()
        with switch.fused(fused):
            out = layer(x.to(device), given.to(device))
        out.backward(upstream)
        results.append((out.detach(), {name: p.grad.clone() for name, p in layer.named_parameters()}))
    (plain, plain_grads), (got, grads) = results
    assert torch.nn.functional.cosine_similarity(got.flatten(), plain.flatten(), dim=0) > 0.999
    # A code that falls on the other side of its threshold moves a few gradients: compare directions.
    for name, want in plain_grads.items():
        assert torch.nn.functional.cosine_similarity(grads[name].flatten(), want.flatten(), dim=0) > 0.98, name
        assert grads[name].norm().item() == pytest.approx(want.norm().item(), rel=0.1), name


@pytest.mark.parametrize(("window", "fuses"), [((8, 8), True), ((8, 9), False)])
def test_large_windows_are_not_fused(window: tuple[int, int], fuses: bool, device: torch.device) -> None:
    """Their maps do not fit the registers, and the plain modules take them."""
    spec = ModelSpec.of_bits(4)
    plain = WindowAttention(C, H, window_size=window)
    layer = QuantWindowAttention(plain, lambda suffix, operand: spec.resolve(suffix, operand), True).to(device)
    with switch.fused():
        assert layer._fuses(torch.zeros(1, device=device)) == fuses


def test_the_state_dict_holds_the_table_and_no_index() -> None:
    _, layer = attention()
    assert "relative_position_bias_table" in layer.state_dict()
    assert "relative_position_index" not in layer.state_dict()
