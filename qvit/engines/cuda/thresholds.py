"""Codes behind an activation as a step function of the whole sum, so that nothing of the way there is left to compute.

A channel's code is a function of its sum: scale, bias, activation, step. GELU falls to its least value and rises from there, so

    code(sum) = lowest + (rising thresholds <= sum) + (falling thresholds > sum)

with thresholds that are found by halving on the function as the reference engine defines it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from qvit.integer import ops
from qvit.quantizers import exact_float

CODES = 16  # thresholds are for four bits: beyond that they are too near to each other for a table
# Where the activations are least.
_LEAST_AT = {"gelu": -0.75179157, "gelu_tanh": -0.75246173, "quick_gelu": -0.75129502}
_CHECKED = 64  # sums a channel on which the thresholds are tried


@dataclass(frozen=True, eq=False)
class Steps:
    """Step functions of the sums of M channels.

    Attributes:
        lowest: least code, int64 [M].
        rising: int64 [R, M], never falling along R; beyond ``reach`` where there are fewer.
        falling: int64 [F, M], never rising along F; ``-reach`` where there are fewer.
        reach: sums are within [-reach, reach].
    """

    lowest: np.ndarray
    rising: np.ndarray
    falling: np.ndarray
    reach: int

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        """Codes of sums [.., M]."""
        codes = np.broadcast_to(self.lowest, sums.shape).copy()
        for threshold in self.rising:
            codes += sums >= threshold
        for threshold in self.falling:
            codes += sums < threshold
        return codes


def activation_steps(layer: ops.Linear, following: ops.Quantizer, activation: str) -> Steps | str:
    """The step functions of a layer's output channels, or why there are none.

    Args:
        layer: in front of the activation.
        following: quantizer of what leaves it.
        activation: ``gelu``, ``gelu_tanh`` or ``quick_gelu``.
    """
    spec = following.spec
    if spec.qp - spec.qn + 1 > CODES:
        return f"{spec.qp - spec.qn + 1} codes, more than {CODES}"
    function = _Codes(layer, following, activation)
    reach, channels = function.reach, len(function.scale)
    least = np.ceil((_LEAST_AT[activation] - function.bias.astype(np.float64)) / function.scale).clip(-reach, reach + 1)
    least = least.astype(np.int64)
    lowest = np.minimum(function(least.clip(-reach, reach)), function((least - 1).clip(-reach, reach)))
    ends = np.broadcast_to(np.array([[-reach], [reach]]), (2, channels))
    most_falling, most_rising = (function(ends) - lowest).max(1)
    up = np.arange(max(most_rising, 0))[:, None]
    rising = _first(lambda s: function(s) > lowest + up, np.tile(least, (len(up), 1)), reach + 1)
    down = np.arange(max(most_falling, 0))[:, None]
    falling = _first(lambda s: function(s) <= lowest + down, np.full((len(down), channels), -reach), least)
    steps = Steps(lowest, rising, falling, reach)
    tried = np.random.default_rng(0).integers(-reach, reach + 1, (_CHECKED, channels))
    near = np.concatenate([rising - 1, rising, falling - 1, falling, [least - 1, least], ends])
    sums = np.concatenate([tried, near]).clip(-reach, reach)
    return steps if np.array_equal(steps(sums), function(sums)) else "codes that rise and fall more than once"


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
        """Codes of sums [.., M]."""
        y = sums.astype(np.float32) * self.scale + self.bias
        x = exact_float.activation(torch.from_numpy(y), self._activation).numpy()
        spec, offset = self._following.spec, self._following.offset
        shifted = x if offset is None else x - offset
        return np.rint(shifted / self._following.scale).clip(spec.qn, spec.qp).astype(np.int64)


def _first(holds: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray | int) -> np.ndarray:
    """The first whole number of [low, high) from which on a condition holds; ``high`` where it never does."""
    low, high = low.copy(), np.maximum(low, high)
    while (low < high).any():
        middle = (low + high) // 2
        found = holds(middle)
        high = np.where(found & (low < high), middle, high)
        low = np.where(~found & (low < high), middle + 1, low)
    return low
