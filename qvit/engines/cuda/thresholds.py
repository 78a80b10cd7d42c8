"""A few codes behind an activation as comparisons of whole numbers, so that nothing of the way there is left to compute.

A channel's code is a function of its sum: scale, bias, activation, step. GELU falls to its least value and rises from there, so

    code(sum) = lowest + [sum >= t1] + [sum >= t2] + [sum >= t3] + [sum < f]

with thresholds that are found by halving on the function as the reference engine defines it.
"""

from __future__ import annotations

import numpy as np
import torch

from qvit.integer import ops
from qvit.quantizers import exact_float

CODES = 4  # thresholds are for two bits: beyond that, comparing takes longer than computing
# Where the activations are least.
_LEAST_AT = {"gelu": -0.75179157, "gelu_tanh": -0.75246173, "quick_gelu": -0.75129502}
_CHECKED = 64  # sums a channel on which the comparisons are tried


def activation_thresholds(layer: ops.Linear, following: ops.Quantizer, activation: str) -> np.ndarray | None:
    """t1, t2, t3 and f of every output channel, int32 [M, 4].

    Args:
        layer: in front of the activation.
        following: quantizer of what leaves it.
        activation: ``gelu``, ``gelu_tanh`` or ``quick_gelu``.

    Returns:
        ``None`` where there are more than four codes, or a channel needs a second comparison on its falling side.
    """
    spec = following.spec
    if spec.qp - spec.qn + 1 > CODES:
        return None
    function = _Codes(layer, following, activation)
    reach, channels = function.reach, len(function.scale)
    low, high = np.full(channels, -reach), np.full(channels, reach + 1)
    least = np.ceil((_LEAST_AT[activation] - function.bias.astype(np.float64)) / function.scale).clip(-reach, reach + 1)
    least = least.astype(np.int64)
    lowest = np.minimum(function(least.clip(-reach, reach)), function((least - 1).clip(-reach, reach)))
    if (function(low) - lowest > 1).any():
        return None
    out = np.empty((channels, 4), np.int64)
    for index, code in enumerate(range(spec.qn + 1, spec.qp + 1)):
        found = _first(lambda s, code=code: function(s) >= code, least, high)
        out[:, index] = np.where(lowest >= code, -reach, found)
    out[:, spec.qp - spec.qn : 3] = reach + 1
    out[:, 3] = _first(lambda s: function(s) <= lowest, low, least)
    tried = np.random.default_rng(0).integers(-reach, reach + 1, (_CHECKED, channels))
    nearby = [out[:, i] + d for i in range(4) for d in (-1, 0)] + [least - 1, least, low, high - 1]
    for sums in [*tried, *(near.clip(-reach, reach) for near in nearby)]:
        if not np.array_equal(compare(out, sums) + spec.qn, function(sums)):
            return None
    return out.astype(np.int32)


def compare(thresholds: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Codes above the lowest of the grid, of one sum a channel [M]."""
    return (sums[:, None] >= thresholds[:, :3]).sum(1) + (sums < thresholds[:, 3])


class _Codes:
    """The function of each channel, in the reference engine's operations."""

    def __init__(self, layer: ops.Linear, following: ops.Quantizer, activation: str) -> None:
        m, k = layer.weight.shape
        half, spec = layer.weight.half_step, layer.weight.spec
        largest = 2 * max(spec.qp, -spec.qn) + 1 if half else max(spec.qp, -spec.qn)
        self.reach = k * max(layer.input.spec.qp, -layer.input.spec.qn) * largest
        scale = np.broadcast_to(layer.input.scale * layer.weight.scale.reshape(-1), (m,)).astype(np.float32)
        self.scale = scale * np.float32(0.5) if half else scale  # exact, so it does not matter when sums are halved
        bias = layer.folded_bias()
        self.bias = np.zeros(m, np.float32) if bias is None else bias
        self._following, self._activation = following, activation

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        """Codes of one sum a channel."""
        y = sums.astype(np.float32) * self.scale + self.bias
        x = exact_float.activation(torch.from_numpy(y), self._activation).numpy()
        spec, offset = self._following.spec, self._following.offset
        shifted = x if offset is None else x - offset
        return np.rint(shifted / self._following.scale).clip(spec.qn, spec.qp).astype(np.int64)


def _first(holds: object, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The first whole number of [low, high) from which on a condition holds; ``high`` where it never does."""
    low, high = low.copy(), np.maximum(low, high)
    while (low < high).any():
        middle = (low + high) // 2
        found = holds(middle)  # type: ignore[operator]
        high = np.where(found & (low < high), middle, high)
        low = np.where(~found & (low < high), middle + 1, low)
    return low
