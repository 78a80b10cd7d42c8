"""Constants by themselves: padding and folding, and that margins are as wide as float32's errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import qvit
from qvit.engines.cuda import constants as c
from qvit.engines.cuda.layout import from_planes, untiled
from qvit.engines.reference import ReferenceEngine
from qvit.integer.ops import Attention, LayerNorm, Quantizer
from qvit.quantizers import exact_float
from qvit.spec import ModelSpec
from tests.engines import cases

Factory = Callable[..., Any]
F32 = np.float32
TO = c.Constants(torch.device("cpu"))
SMALL = cases.SMALL | {"embed_dim": 96, "num_heads": 3, "depth": 1}


@pytest.fixture
def freeze(make_student: Factory, small_vit: Factory, perturb: Factory) -> Factory:
    """``freeze(**fields of ModelSpec)``: one block of 96 channels."""
    return lambda **fields: qvit.freeze(perturb(make_student(small_vit(**SMALL), **fields)))


def test_vectors_are_padded() -> None:
    assert TO.floats(2.5, 3).tolist() == [2.5, 2.5, 2.5]
    assert TO.floats(np.array([[0.5]]), 2, 4, 1.0).tolist() == [0.5, 0.5, 1.0, 1.0]
    assert TO.floats(np.arange(3), 3, 5).tolist() == [0.0, 1.0, 2.0, 0.0, 0.0]
    assert TO.floats(7.0, 1, 2).dtype == torch.float32
    with pytest.raises(ValueError, match="broadcast"):
        TO.floats(np.arange(3), 2)


@pytest.mark.parametrize("changes", [{}, {"weight_quantizer": "statsq"}])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_linear_layer_is_the_reference_engines(bits: int, changes: dict[str, Any], freeze: Factory) -> None:
    """Sums of what lies in memory, scale and bias give its floats; of two bits also as planes."""
    if bits == 8 and changes:
        pytest.skip("8 bits at odd half steps are refused")
    model = freeze(spec=ModelSpec.of_bits(bits, **changes))
    reference = ReferenceEngine(model)
    (block,) = model.blocks
    for layer in (block.qkv, block.proj, block.fc1, block.fc2):
        (m, k), spec = layer.weight.shape, layer.input.spec
        found = c.LinearConstants.of(layer, TO)
        assert (found.m, found.k, found.signed, found.half) == (m, k, spec.signed, layer.weight.half_step)
        b = untiled(found.b)
        assert b.shape[0] % 256 == b.shape[1] % 128 == 0
        assert not b[m:].any()
        assert not b[:, k:].any()
        codes = torch.randint(spec.qn, spec.qp + 1, (5, k), dtype=torch.int16)
        sums = (codes.long() @ b[:m, :k].long().T).float() * (0.5 if found.half else 1.0)
        assert torch.equal(sums * found.scale[:m] + found.bias[:m], reference.linear(codes, layer))
        assert (found.b_planes is not None) == (bits == 2 and not changes and not spec.signed)
        if found.b_planes is not None:
            two_bits = from_planes(untiled(found.b_planes), k)[:m]
            assert torch.equal(two_bits, (b[:m, :k] & 3).to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("changes", [{}, {"overrides": {"blocks.*.input": {"signed": True}}}])
def test_margins_of_norms_cover_float32s_errors(bits: int, changes: dict[str, Any], freeze: Factory) -> None:
    """Of the value in codes, and of its place in their range; rows with a large mean, whose moments lose digits, too."""
    (block,) = freeze(spec=ModelSpec.of_bits(bits, **changes)).blocks
    norm, quantizer = block.norm1, block.qkv.input
    found = c.NormConstants.of(norm, quantizer, TO)
    assert found.gain is not None
    assert found.shift is not None
    assert found.place_gain is not None
    assert found.place_shift is not None
    width = len(norm.weight)
    x = torch.randn(400, width) * torch.rand(400, 1).add(0.1) + torch.linspace(-8, 8, 400)[:, None]
    exact = _codes_of(x, norm, quantizer)
    spec = quantizer.spec
    near = (exact > spec.qn - 1) & (exact < spec.qp + 1)  # others are clamped
    assert near.sum() > 10_000
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    inverse = torch.rsqrt(variance + norm.eps)
    error = ((x - mean) * inverse * found.gain + found.shift).double() - exact
    allowed = found.margin * (1 + 0.25 * mean.abs() * inverse)  # as `src/norm_row.cuh` has it
    assert bool((error.abs() <= allowed)[near].all())
    assert found.margin < 1e-3
    # The other way, of `src/few_norm.cuh`: both moments in one pass.
    square = (x * x).mean(1, keepdim=True)
    inverse = torch.rsqrt(square - mean * mean + norm.eps)
    place = found.place_gain * ((x - mean) * inverse) + found.place_shift
    codes = place.double() * (spec.qp - spec.qn) + spec.qn
    a, slope = found.place_margins
    allowed = a + slope * (square / (square - mean * mean)).double()
    assert bool(((codes - exact).abs() <= allowed)[near].all())
    assert float(allowed.median()) < 0.05


def _codes_of(x: torch.Tensor, norm: LayerNorm, quantizer: Quantizer) -> torch.Tensor:
    """What the reference engine rounds, in float64 from the LayerNorm's float32 on."""
    y = exact_float.layer_norm(x, torch.from_numpy(norm.weight), torch.from_numpy(norm.bias), norm.eps).double()
    offset = 0.0 if quantizer.offset is None else torch.from_numpy(quantizer.offset).double()
    return (y - offset) / torch.from_numpy(quantizer.scale).double()


VALUES = {"learned": {}, "half step": {"offset": "half_step"}, "none": {"offset": "none"}, "per head": {"offset": "per_head"}}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", VALUES)
def test_values_near_a_boundary_are_computed_again(name: str, bits: int, freeze: Factory) -> None:
    """Places in fixed point, as attention has them, are as near to the reference engine's as they are said to be."""
    (block,) = freeze(spec=ModelSpec.of_bits(bits, overrides={"*.v": VALUES[name]} if VALUES[name] else {})).blocks
    attention, following = block.attention, block.proj.input
    of, found = c.AttentionConstants.of(attention, TO), c.ValueConstants.of(attention, following, TO)
    assert of.value_offset == {"learned": 2, "half step": 1, "none": 0, "per head": 2}[name]
    tokens, count = 17, attention.heads * attention.head_dim
    maps, v = attention.map.spec, attention.v.spec
    rows = torch.randint(0, maps.qp + 1, (300, tokens))
    rows = torch.where(torch.rand(300, tokens) < 0.8, torch.zeros_like(rows), rows)
    codes = torch.randint(v.qn, v.qp + 1, (tokens, count))
    sums, row = rows @ codes, rows.sum(1, keepdim=True)
    # The reference engine: floats, then quantize.
    if of.value_offset == 1:
        y = (2 * sums + row).float() * 0.5 * of.value_scale
    else:
        y = sums.float() * of.value_scale
        y = y if of.value_row is None else y + row.float() * of.value_row
    step = torch.from_numpy(np.broadcast_to(following.scale, (count,)).copy())
    y = y if following.offset is None else y - torch.from_numpy(following.offset)
    wanted = (y / step).double()
    place = sums.float() * found.gain + (row.float() * found.row_gain + found.shift)
    got = place.double() * (found.high - found.low) + found.low
    near = found.near(tokens * of.map_high)
    inside = (wanted > found.low - 1) & (wanted < found.high + 1)
    # A row's values of the map add up to one, or to what its few codes make of it; near() goes by that.
    whole = (row.double() * torch.from_numpy(_by_head(attention))).amax(1, keepdim=True) <= 2.01
    error = (got - wanted).abs() * 2**found.binary_places
    assert int((inside & whole).sum()) > 100
    assert float(error[inside & whole].max()) <= near
    assert near < 2 ** (found.binary_places - 1) or bits == 8


def _by_head(attention: Attention) -> np.ndarray:
    """Steps of the map, float64 [H]."""
    return np.broadcast_to(attention.map.scale.reshape(-1), (attention.heads,)).astype(np.float64)


@pytest.mark.parametrize("bits", range(2, 9))
def test_q_and_its_half_step_share_a_byte_up_to_seven_bits(bits: int, freeze: Factory) -> None:
    (block,) = freeze(spec=ModelSpec.of_bits(4, overrides={"*.q": bits})).blocks
    assert block.attention.q.half_step
    assert c.doubles_q(block.attention) == (bits <= 7)


def test_scores_are_whole_numbers_times_a_scale(freeze: Factory) -> None:
    """With q's half step as ``2 c + 1``, the reference engine's scores bit for bit."""
    model = freeze(spec=ModelSpec.of_bits(4))
    (block,) = model.blocks
    attention, of = block.attention, c.AttentionConstants.of(block.attention, TO)
    q, k = (torch.randint(-8, 8, (2, attention.heads, 7, attention.head_dim), dtype=torch.int16) for _ in range(2))
    scores = ReferenceEngine(model).scores(q, k, attention)
    doubled = (2 * q.long() + 1) @ k.long().transpose(-2, -1)
    torch.testing.assert_close(doubled.float() * of.score_scale[:, None, None], scores, rtol=3e-7, atol=0)


def test_codes_of_all_pixels(freeze: Factory) -> None:
    """The table of 8-bit pixels is what the reference engine makes of normalised ones."""
    model = freeze(spec=ModelSpec.of_bits(4))
    found = c.PixelConstants.of(model, TO)
    side = SMALL["img_size"]
    pixels = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 3, side, side).contiguous()
    wanted: dict[str, torch.Tensor] = {}
    ReferenceEngine(model).forward(torch.from_numpy(model.preprocessing.normalise(pixels.numpy())), wanted)
    codes = wanted["patch_embed.proj.input"].reshape(256, -1, 3, model.architecture.patch_features // 3)[:, 0, :, 0]
    assert torch.equal(found.codes.T.to(torch.int16), codes)
    assert found.identity == bool((codes == torch.arange(256)[:, None]).all())
