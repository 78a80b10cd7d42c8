"""Codes behind an activation as a step function of the whole sum, so that nothing of the way there is left to compute.

A channel's code is a function of its sum: scale, bias, activation, step. GELU falls to its least value and rises from there, so

    code(sum) = lowest + (rising thresholds <= sum) + (falling thresholds > sum)

with thresholds that are found by halving on the function as the reference engine defines it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from qvit.integer import ops
from qvit.quantizers import exact_float
from qvit.spec import QuantSpec

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
    function = _Codes(layer, slice(None), following.scale, following.offset, spec, activation)
    reach = function.reach
    least = np.ceil((_LEAST_AT[activation] - function.bias.astype(np.float64)) / function.scale).clip(-reach, reach + 1)
    return _steps(function, least.astype(np.int64))


def linear_steps(layer: ops.Linear, columns: slice, scale: np.ndarray, offset: np.ndarray, spec: QuantSpec) -> Steps | str:
    """The same of some output channels with nothing between them and their codes; the lowest code of the grid counts as 0.

    Args:
        layer: in front of the codes.
        columns: the channels.
        scale, offset: of the codes, float32 [channels].
        spec: their range.
    """
    function = _Codes(layer, columns, scale, offset, spec, None)
    steps = _steps(function, np.full(len(function.scale), -function.reach))
    return steps if isinstance(steps, str) else replace(steps, lowest=steps.lowest - spec.qn)


def _steps(function: _Codes, least: np.ndarray) -> Steps | str:
    """Steps of functions that fall up to ``least`` [M] and rise from there."""
    reach, channels = function.reach, len(function.scale)
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

    def __init__(
        self,
        layer: ops.Linear,
        columns: slice,
        step: np.ndarray,
        offset: np.ndarray | None,
        spec: QuantSpec,
        activation: str | None,
    ) -> None:
        m, k = layer.weight.shape
        half, weights = layer.weight.half_step, layer.weight.spec
        largest = 2 * max(weights.qp, -weights.qn) + 1 if half else max(weights.qp, -weights.qn)
        self.reach = k * max(layer.input.spec.qp, -layer.input.spec.qn) * largest
        scale = np.broadcast_to(layer.input.scale * layer.weight.scale.reshape(-1), (m,)).astype(np.float32)[columns]
        self.scale = scale * np.float32(0.5) if half else scale  # exact, so it does not matter when sums are halved
        bias = layer.folded_bias()
        self.bias = (np.zeros(m, np.float32) if bias is None else bias)[columns]
        self._step, self._offset, self._spec, self._activation = step, offset, spec, activation

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        """Codes of sums [.., M]."""
        x = sums.astype(np.float32) * self.scale + self.bias
        if self._activation is not None:
            x = exact_float.activation(torch.from_numpy(x), self._activation).numpy()
        shifted = x if self._offset is None else x - self._offset
        return np.rint(shifted / self._step).clip(self._spec.qn, self._spec.qp).astype(np.int64)


def _first(holds: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray | int) -> np.ndarray:
    """The first whole number of [low, high) from which on a condition holds; ``high`` where it never does."""
    low, high = low.copy(), np.maximum(low, high)
    while (low < high).any():
        middle = (low + high) // 2
        found = holds(middle)
        high = np.where(found & (low < high), middle, high)
        low = np.where(~found & (low < high), middle + 1, low)
    return low
