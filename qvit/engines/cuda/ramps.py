"""Codes of a linear layer's outputs from its whole sums, in two instructions.

Scale, bias, offset and step make a code of a sum, a step function whose steps are nearly equally far from each other. Hence

    code = (min(max(sum + shift, 0), most) * factor + add >> 24) % 256

with whole numbers that are found for each channel: its thresholds, as the reference engine's roundings have them, are
inequalities between factor and add, so that nothing is left to rounding.
"""

from __future__ import annotations

import numpy as np

from qvit.engines.cuda.thresholds import Steps

_SHIFT = 24
_NEARBY = 64  # factors that are tried on either side of the likeliest


def ramps(steps: Steps, slope: np.ndarray, lowest: int) -> np.ndarray | str:
    """shift, most, factor and add of every channel, int64 [M, 4], or why there are none.

    Args:
        steps: the step functions.
        slope: codes per unit of the sum, about, [M].
        lowest: what code 0 of them is written as.
    """
    if len(steps.falling):
        return "codes that fall where sums rise"
    there = (steps.rising > -steps.reach) & (steps.rising <= steps.reach)
    first = np.where(there, steps.rising, steps.reach).min(0, initial=steps.reach)
    last = np.where(there, steps.rising, -steps.reach).max(0, initial=-steps.reach)
    shift, most = 1 - first, np.maximum(last - first + 1, 0)
    # What follows from w = sum + shift: every code begins at its threshold, and no sooner.
    below = steps(-shift)  # at w = 0
    code = below + np.cumsum(there, 0)
    w = steps.rising + shift
    likeliest = np.where(there.sum(0) > 1, np.rint(slope * float(1 << _SHIFT)), 1 << _SHIFT).astype(np.int64)
    found = np.zeros((len(shift), 4), np.int64)
    left = np.ones(len(shift), bool)
    for nearby in range(2 * _NEARBY + 1):
        factor = np.maximum(likeliest + (nearby + 1) // 2 * (-1 if nearby % 2 else 1), 0)
        low = np.where(there, (code << _SHIFT) - w * factor, below << _SHIFT).max(0, initial=0)
        low = np.maximum(low, below << _SHIFT)
        high = np.where(there, (code << _SHIFT) - 1 - (w - 1) * factor, 1 << 60).min(0, initial=1 << 60)
        high = np.minimum(high, (steps(steps.reach + 0 * shift) + 1 << _SHIFT) - 1 - most * factor)
        right = left & (low <= high)
        found[right] = np.stack([shift, most, factor, (low + high) // 2], 1)[right]
        left &= ~right
        if not left.any():
            break
    if left.any():
        return f"steps of {left.sum()} channels that are too uneven"
    found[:, 3] = (found[:, 3] + (lowest << _SHIFT)) % (1 << 32)
    return found


def ramp_codes(found: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Bytes of sums [.., M]; what the kernels compute."""
    shift, most, factor, add = found.T
    return ((sums + shift).clip(0, most) * factor + add) % (1 << 32) >> _SHIFT
