"""How near to the boundary between two codes a float step is computed again, as it is defined."""

from __future__ import annotations

import numpy as np

from qvit.integer import ops
from qvit.spec import QuantSpec

ULPS = 1e-6  # relative error that the float32 steps stay below


def activation_margin(quantizer: ops.Quantizer) -> float:
    """How near to the boundary between two codes an activation is computed again."""
    spec, step = quantizer.spec, float(quantizer.scale.min())
    offset = 0.0 if quantizer.offset is None else float(np.abs(quantizer.offset).max())
    return min(ULPS * (spec.qp - spec.qn + 1) + (6e-7 + 3e-7 * offset) / step, 1.0)


def norm_margin(spec: QuantSpec, gain: np.ndarray, shift: np.ndarray) -> float:
    """The same of a value behind a LayerNorm or IRM; kernels make it wider by ``margin / 4 * |mean| / deviation``.

    That is for the mean, which loses digits where it is large beside the deviation, and meets the gain. It has a rounding
    (2^-24) for each value that a lane adds up, half a one as sums are half as large as the last on average, and eight more. A
    lane has pairs of every 16th value in rows of up to 384 (`src/epilogue_norm.cuh`); heads are shorter.

    Args:
        spec: of the codes.
        gain, shift: of standardised values to codes; the last dimension is that of a row.
    """
    width, ulp = gain.shape[-1], ULPS / 16
    reach = max(spec.qp, -spec.qn) + 1 + float(np.abs(shift).max())
    depth = max(8 + width / 64, 6.5 + min(width, 384) / 32)
    return min(max(ULPS * reach, 4 * ulp * depth * float(np.abs(gain).max())), 1.0)


def place_margins(spec: QuantSpec, gain: np.ndarray, shift: np.ndarray, offset: np.ndarray) -> tuple[float, float]:
    """How far a place in `src/norm_places.cuh` is from the reference engine's value, in codes, at most: a + b E[x^2] / Var[x].

    In units of 2^-24: mean and E[x^2] have seven roundings behind each other, two of their factor, one for every 128 channels.
    The variance has three times as many of E[x^2], its root's inverse half of that, and six of its own. The mean's own meet the
    gain. Constants, differences and the place have six together, the reference engine's value three, of which one is of a value
    with its offset still in it. Places have half of their last binary place.
    """
    reach = max(spec.qp, -spec.qn) + 1 + float(np.abs(shift).max(initial=0.0))
    depth, ulp = 9 + -(-len(gain) // 128), ULPS / 16
    most, moved = float(np.abs(gain).max(initial=0.0)), float(np.abs(offset).max(initial=0.0))
    a = 2.0 ** (-16 if spec.qp - spec.qn > 127 else -17) + ulp * (20 * reach + depth * most + moved)
    return a, ulp * ((1.5 * depth + 3) * reach + depth * most)


def row_margins(quantizer: ops.Quantizer, rectify: ops.Rectify | None) -> tuple[float, float]:
    """How far a code between two neighbours is from what the rectified kernel computes, at most: a + b E[y^2] / Var[y]."""
    if rectify is None:
        return 0.0, 0.0
    spec, step, ulp = quantizer.spec, quantizer.scale.astype(np.float64), ULPS / 16
    offset = np.zeros(1) if quantizer.offset is None else quantizer.offset.astype(np.float64)
    codes = spec.qp - spec.qn + 1
    shapes = (rectify.weight[:, None], rectify.bias[:, None])
    gain, shift = float(np.abs(shapes[0] / step).max()), float(np.abs((shapes[1] - offset) / step - spec.qn).max())
    reach = codes + shift  # of the product with gain, where the sum is within the range of the codes
    # Roundings: mean and E[y^2] are sums of 8 behind each other, rsqrt has two, the others one each; the reference has its own.
    return (
        2.0**-17 + ulp * (10 * reach + float(np.abs(offset / step).max()) + shift + 4 * codes),
        ulp * (12 * reach + 10 * gain),
    )


def map_margin(high: int, tokens: int) -> float:
    """The same of a value of the softmax map in `src/attention_thrice.cuh`.

    A lane adds up every fourth exponential, one after the other: half a rounding (2^-24) each, and 25 for all else.

    Args:
        high: highest code.
        tokens: keys of a row.
    """
    return ULPS * max(3.0, 1.5 + tokens / 128) * (high + 1)


def unit() -> float:
    """Of float32's relative errors, 2^-24, by as much wider as `ULPS` is."""
    return ULPS / 1e-6 * 2.0**-24
