"""Margins are as wide as the errors of the float32 steps that they stand for, and not much wider.

The steps are written out in NumPy with the kernels' order of operations, on random rows and on those that lose most digits:
means far larger than deviations, one channel with a large gain, equal exponentials that are all rounded the same way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qvit.engines.cuda.folded import margins
from qvit.engines.cuda.folded.margins import activation_margin, map_margin, norm_margin, place_margins, row_margins, unit
from qvit.integer.ops import Quantizer, Rectify
from qvit.quantizers import exact_float
from qvit.spec import PerTensor, QuantSpec

F32 = np.float32
Array = np.ndarray
LOG2E = F32(1.44269504)
EPS = 1e-6


def fma(a: Array, b: Any, c: Any) -> Array:
    """float32, rounded once."""
    return (a.astype(np.float64) * np.float64(b) + np.float64(c)).astype(F32)


def moved(x: Array, ulps: int) -> Array:
    """Positive float32 numbers, so many units of their last place larger."""
    return np.where(x > 0, (x.astype(F32).view(np.int32) + ulps).view(F32), x)


def one_after_another(parts: Array) -> Array:
    """float32 [n, ..] -> [..]."""
    out = np.zeros_like(parts[0])
    for part in parts:
        out = out + part
    return out


def halves_meet(lanes: Array) -> Array:
    """Sums over the last dimension, in pairs, as lanes exchange them; [R, lanes] -> [R, 1]."""
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    return lanes


def rsqrt(x: Array, ulps: int) -> Array:
    return moved((1 / np.sqrt(x.astype(np.float64))).astype(F32), ulps)


def exact_codes(x: Array, affine: tuple[Array, Array], offset: Array, step: F32, standardised: bool = False) -> Array:
    """What the reference engine rounds: behind LayerNorm, or behind values that are float32 when they are standardised."""
    weight, bias = affine
    wide = x.astype(np.float64)
    z = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + EPS)
    y = z.astype(F32) * weight + bias if standardised else (z * weight + bias).astype(F32)
    return ((y - offset) / step).astype(np.float64)


def worst(error: Array, allowed: Array, exact: Array, spec: QuantSpec) -> float:
    """Largest share of what is allowed, of values that are not clamped."""
    near = (exact > spec.qn - 1) & (exact < spec.qp + 1)
    assert near.mean() > 0.01
    return float(np.where(near, np.abs(error) / allowed, 0.0).max())


def rows_of(width: int, rng: np.random.Generator) -> list[Array]:
    """Rows by their means, which are up to 1,000 deviations; in the last ones a lane's values are equal, and rounded alike."""
    random = [rng.standard_normal((150, width)) + mean for mean in (0, 1, -30, 1000)]
    turns = np.where(np.arange(width) % 2, 1.0, -1.0)
    equal = [mean * rng.uniform(1, 2, (100, 1)) + turns for mean in (30, 1000)]
    return [x.astype(F32) for x in (*random, *equal)]


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize(
    ("bits", "step", "offset"), [(2, 1.0, -0.17), (4, 0.3, -0.17), (8, 0.02, 5.0), (8, 0.002, -0.17), (4, 1e-3, 0.0)]
)
def test_activations(name: str, bits: int, step: float, offset: float) -> None:
    """`fast_activation` of ``src/rounding.cuh``, whose special functions are two units of the last place off."""
    spec = QuantSpec(bits, offset=PerTensor())
    margin = activation_margin(Quantizer(spec, np.array([step], F32), np.array([offset], F32)))
    inside = np.linspace(offset - step, offset + step * (spec.qp + 1), 20_001)
    x = np.concatenate([np.linspace(-8, 8, 40_001), inside]).astype(F32)
    exact = (exact_float.activation(torch.from_numpy(x), name).numpy() - F32(offset)) / F32(step)
    shares = []
    for ulps in (-2, 0, 2):
        if name == "gelu":
            erf = torch.erf(torch.from_numpy(x * F32(0.70710678)).double()).numpy().astype(F32)
            y = F32(0.5) * x * (1 + np.sign(erf) * moved(np.abs(erf), ulps).clip(0, 1))
        else:
            u = F32(1.702) * x if name == "quick_gelu" else F32(1.5957691216) * (x + F32(0.044715) * x * x * x)
            e = moved(np.exp2(np.minimum(-LOG2E * u, 126).astype(np.float64)).astype(F32), ulps)
            y = x * moved((1 / (1 + e).astype(np.float64)).astype(F32), -ulps)
        v = (y - F32(offset)) * F32(1 / F32(step))
        assert v.dtype == F32
        shares.append(worst(v - exact, np.full_like(v, margin), exact, spec))
    assert 0.005 < max(shares) <= 1


def quantizers(bits: int, width: int, outlier: float, rng: np.random.Generator) -> tuple[QuantSpec, Any, Array, F32]:
    """A range of two deviations, an affine part, offset and step; one channel whose weight is so many times larger."""
    spec = QuantSpec(bits, offset=PerTensor())
    weight = (1 + 0.3 * rng.standard_normal(width)).astype(F32)
    weight[width // 3] *= F32(outlier)
    bias = (0.3 * rng.standard_normal(width)).astype(F32)
    return spec, (weight, bias), np.full(width, -2.0, F32), F32(4 / (spec.qp - spec.qn))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_norms_behind_a_product(bits: int) -> None:
    """``src/epilogue_norm.cuh``, a lane's fours 16 apart."""
    rng, shares = np.random.default_rng(bits), []
    for width in (64, 192, 384):
        for outlier in (1, 4, 40):
            spec, (weight, bias), offset, step = quantizers(bits, width, outlier, rng)
            gain = (weight / np.float64(step)).astype(F32)
            shift = ((bias - offset.astype(np.float64)) / step).astype(F32)
            margin = norm_margin(spec, gain, shift)
            for x in rows_of(width, rng):
                fours = x.reshape(len(x), -1, 4, 4).transpose(3, 1, 0, 2)  # [value, sixteen, row, lane of a quad]
                total = halves_meet(one_after_another(fours[0] + fours[1]) + one_after_another(fours[2] + fours[3]))
                mean = total * F32(1 / width)
                d = x - mean
                squares = halves_meet(one_after_another((d * d).reshape(len(x), -1, 32).transpose(1, 0, 2)))
                rstd = rsqrt(squares * F32(1 / width) + F32(EPS), 2)
                exact = exact_codes(x, (weight, bias), offset, step)
                allowed = margin * (1 + 0.25 * np.abs(mean) * rstd)
                shares.append(worst(fma(d * rstd, gain, shift) - exact, allowed, exact, spec))
    assert 0.1 < max(shares) <= 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_places_of_norms(bits: int) -> None:
    """``src/norm_places.cuh``: both moments in one pass, four sums of each a lane; codes in fixed point.

    Rows of 3,072 are those that a Swin merges.
    """
    rng, shares = np.random.default_rng(bits), []
    for width in (96, 384, 1024, 3072):
        for outlier in (1, 4, 40):
            spec, (weight, bias), offset, step = quantizers(bits, width, outlier, rng)
            span, low, wide = spec.qp - spec.qn, spec.qn, np.float64(step)
            gain, shift = weight / wide, (bias - offset.astype(np.float64)) / wide
            place_gain, place_shift = (gain / span).astype(F32), ((shift - low) / span).astype(F32)
            a, slope = place_margins(spec, gain, shift, offset / wide)
            unit_of_place = 2.0 ** -(15 if span > 127 else 16)
            for x in rows_of(width, rng):
                parts = np.zeros((-(-width // 128) * 4, len(x), 32), F32)
                parts[: width // 32] = x.reshape(len(x), -1, 32).transpose(1, 0, 2)
                sums, squares = np.zeros((2, 4, len(x), 32), F32)
                for first in range(0, len(parts), 4):
                    sums = sums + parts[first : first + 4]
                    squares = fma(parts[first : first + 4], parts[first : first + 4], squares)
                mean = halves_meet((sums[0] + sums[1]) + (sums[2] + sums[3])) * F32(1 / width)
                square = halves_meet((squares[0] + squares[1]) + (squares[2] + squares[3])) * F32(1 / width)
                rstd = rsqrt(np.maximum(fma(-mean, mean, square), 0) + F32(EPS), 2)
                place = fma(fma(x, rstd, -mean * rstd), place_gain, place_shift).clip(0, 1)
                found = np.rint(place.astype(np.float64) * span / unit_of_place) * unit_of_place + low
                exact = exact_codes(x, (weight, bias), offset, step)
                share = np.abs(found - exact) / (a + slope * (square * rstd * rstd))
                shares.append(float(share[(exact > spec.qn) & (exact < spec.qp)].max()))
    assert 0.05 < max(shares) <= 1


@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_places_of_rectified_codes(bits: int, head_dim: int) -> None:
    """`rectified` of ``src/epilogue_heads.cuh``: four sums of each moment a lane, then four lanes."""
    rng, shares = np.random.default_rng(bits), []
    for outlier in (1, 4, 40):
        spec, (weight, bias), offset, step = quantizers(bits, head_dim, outlier, rng)
        quantizer = Quantizer(spec, step.reshape(1, 1, 1), offset.reshape(1, 1, -1))
        a, slope = row_margins(quantizer, Rectify(weight[None], bias[None], EPS))
        span, wide = spec.qp - spec.qn, np.float64(step)
        gain = (weight / wide / span).astype(F32)
        shift = (((bias - offset.astype(np.float64)) / wide - spec.qn) / span).astype(F32)
        for x in rows_of(head_dim, rng):
            pairs = x.reshape(len(x), -1, 2, 4, 2).transpose(2, 4, 1, 0, 3)  # [odd fragment, second, fragments, row, lane]
            sums, squares = (np.zeros((2, 2, len(x), 4), F32) for _ in range(2))
            for i in range(pairs.shape[2]):
                sums = sums + pairs[:, :, i]
                squares = fma(pairs[:, :, i], pairs[:, :, i], squares)
            mean = halves_meet((sums[0, 0] + sums[0, 1]) + (sums[1, 0] + sums[1, 1])) * F32(1 / head_dim)
            square = halves_meet((squares[0, 0] + squares[0, 1]) + (squares[1, 0] + squares[1, 1])) * F32(1 / head_dim)
            rstd = rsqrt(np.maximum(fma(-mean, mean, square), 0) + F32(EPS), 2)
            place = fma(fma(x, rstd, -mean * rstd), gain, shift).clip(0, 1)
            found = np.rint(place.astype(np.float64) * span * 2**16) / 2**16 + spec.qn
            exact = exact_codes(x, (weight, bias), offset, step, standardised=True)
            share = np.abs(found - exact) / (a + slope * (square * rstd * rstd))
            shares.append(float(share[(exact > spec.qn) & (exact < spec.qp)].max()))
    assert 0.05 < max(shares) <= 1


def test_without_irm_no_code_is_in_doubt() -> None:
    assert row_margins(Quantizer(QuantSpec(4), np.ones(1, F32), None), None) == (0.0, 0.0)


def scores_of(tokens: int, scale: F32, rng: np.random.Generator, rows: int = 30) -> Array:
    """Whole numbers [rows, tokens]: random ones; or one above all others, which are equal, another distance in every row."""
    random = rng.integers(-2000, 2000, (rows, tokens))
    equal = np.repeat(rng.integers(-3000, 3000, (rows, 1)), tokens, 1)
    equal[:, rng.integers(tokens)] += rng.integers(0, int(3 / scale) + 1, rows)
    return np.concatenate([random, equal])


def exact_map(s: Array, scale: F32) -> Array:
    return exact_float.softmax(torch.from_numpy(s.astype(F32) * scale)).numpy()


@pytest.mark.parametrize("tokens", [49, 197, 577, 1024])
@pytest.mark.parametrize("high", [3, 255])
def test_maps_of_scores_computed_three_times(high: int, tokens: int) -> None:
    """``src/attention_thrice.cuh``: a lane adds up every fourth pair of keys, one after another."""
    rng, shares = np.random.default_rng(tokens), []
    margin = map_margin(high, tokens)
    for exponent in np.linspace(-4, -1.5, 15):
        scale = F32(10**exponent)
        s = scores_of(tokens, scale, rng)
        p = exact_map(s, scale)
        step = F32(np.median(p) / (high - 0.4))
        exact = p / step
        most = s.max(1, keepdims=True)
        e = np.exp2(((s - most).astype(F32) * (scale * LOG2E)).astype(np.float64)).astype(F32)
        lanes = [one_after_another(e[:, np.arange(tokens) % 8 // 2 == t].T) for t in range(4)]
        total = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3])
        v = e * (F32(1) / (total * step))[:, None]
        allowed = margin * (1 + 0.1 * np.abs(most.astype(F32) * scale))
        shares.append(float((np.abs(v - exact) / allowed)[exact < high + 0.5].max()))
    assert 0.05 < max(shares) <= 1


@pytest.mark.parametrize("tokens", [49, 197, 256])
def test_the_unit_of_the_maps_errors(tokens: int) -> None:
    """``src/attention_once.cuh``: exponentials of scores as they are; its terms are units of the error relative to a value."""
    rng, shares, high = np.random.default_rng(tokens), [], 15
    whole, pairs = F32(12582912.0), -(-tokens // 16)
    for exponent in np.linspace(-4, -2, 10):
        scale = F32(10**exponent)
        s = scores_of(tokens, scale, rng)
        exact = exact_map(s, scale)
        step = F32(np.median(exact) / (high - 0.4))
        factor = scale * LOG2E
        product = whole * factor
        x = fma(whole + s.astype(F32), factor, -product)
        e = (np.exp2(x.astype(np.float64)) * (1 + 2.0**-22 * rng.choice([-1, 1], x.shape))).astype(F32)
        padded = np.zeros((len(s), 16 * pairs), F32)
        padded[:, :tokens] = e
        of_pair = padded.reshape(len(s), pairs, 2, 4, 2)  # [row, pair, tile, lane, second]
        tiles = of_pair[..., 0] + of_pair[..., 1]
        sums = (tiles[:, :, 0] + tiles[:, :, 1]).transpose(1, 0, 2)
        total = halves_meet(one_after_another(sums[0::2]) + one_after_another(sums[1::2]))
        v = e * (F32(1) / (total * step))
        level, shift = np.abs(np.log2(total)), np.abs(float(whole) * float(factor) - float(product))
        mean = np.maximum(np.log2(e.max(1, keepdims=True)), 0) + 0.54 * tokens / total
        near = 21 + (pairs + 1) / 2 + 2.3 * (shift + np.minimum(level + 10, mean))
        y = np.abs(s * (float(scale) * np.log2(np.e)))
        allowed = unit() * (near + 2.3 * y) * v
        shares.append(float((np.abs(v - (exact / step).astype(np.float64)) / allowed)[total[:, 0] > 1e-18].max()))
    assert 0.1 < max(shares) <= 1


def test_no_margin_is_wider_than_a_step_and_all_follow_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond half a step every value is in doubt, and more would not be a float32's; tests widen them all by one number."""
    spec, ones = QuantSpec(4, offset=PerTensor()), np.ones(32)
    tiny = Quantizer(spec, np.array([1e-9], F32), np.array([1.0], F32))

    def all_of_them() -> list[float]:
        rectify = Rectify(np.ones((1, 32), F32), np.zeros((1, 32), F32), EPS)
        parts = [activation_margin(Quantizer(spec, np.ones(1, F32), None)), norm_margin(spec, ones, ones), map_margin(15, 197)]
        parts += [*place_margins(spec, ones, ones, ones), *row_margins(Quantizer(spec, np.ones((1, 1, 1), F32), None), rectify)]
        return [*parts, unit()]

    assert activation_margin(tiny) == 1.0
    assert norm_margin(spec, 1e9 * ones, ones) == norm_margin(spec, ones, 1e9 * ones) == 1.0
    before = all_of_them()
    monkeypatch.setattr(margins, "ULPS", 1000 * margins.ULPS)
    assert all(1 < wide / narrow <= 1001 for wide, narrow in zip(all_of_them(), before, strict=True))
