"""The scale and offset with the least squared error on a sample of values: a grid, then alternating least squares.

Used by calibration, never by a forward pass.
"""

from __future__ import annotations

import torch

from qvit.quantizers.lsq import repeat_groups
from qvit.spec import HalfStep, PerGroup, QuantSpec

_GRID = 48  # clipping ranges tried, geometric from the whole range of the values down to a hundredth
_REFINEMENTS = 12
_SMALLEST = 1e-8


def mse_optimal(
    x: torch.Tensor, spec: QuantSpec, scale_shape: tuple[int, ...], offset_shape: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and offset that minimise ``sum (value - x)^2`` over the sample.

    The grid tries ever narrower ranges, [mean - t (mean - min), mean + t (max - mean)]; from the best one, scale and offset
    are solved for in turn with the codes held fixed (Lloyd's iteration restricted to uniform levels), which only lowers the
    error.

    Args:
        x: sample, batch first: [S, K], [S, N, K], [S, H, N, D] or, for a weight, [M, K].
        spec: code range and granularity.
        scale_shape: shape of the scale, broadcastable against ``x`` (`QuantSpec.scale_shape`).
        offset_shape: shape of the learned offset, or ``None``.

    Returns:
        ``(scale, offset)`` of these shapes, float32; ``offset`` is ``None`` where none is learned.
    """
    problem = _Problem(x.detach().float(), spec, scale_shape, offset_shape)
    scale, offset = problem.grid()
    return problem.refine(scale, offset)


class _Problem:
    """One sample with its reductions over whatever shares a scale or an offset."""

    def __init__(self, x, spec, scale_shape, offset_shape):  # type: ignore[no-untyped-def]
        self.x, self.spec, self.scale_shape, self.offset_shape = x, spec, tuple(scale_shape), offset_shape
        self.half = isinstance(spec.offset, HalfStep)
        # One clipping range an entry of the scale, unless offsets tie the entries together.
        self.tied = offset_shape is not None and tuple(offset_shape) != self.scale_shape

    def _grouped(self, values: torch.Tensor) -> torch.Tensor:
        if isinstance(self.spec.scale, PerGroup):
            return values.unflatten(-1, (-1, self.spec.scale.size)).sum(-1)
        return values

    def sum_scale(self, values: torch.Tensor) -> torch.Tensor:
        return self._grouped(values).sum_to_size(self.scale_shape)

    def max_scale(self, values: torch.Tensor) -> torch.Tensor:
        """The largest value [scale_shape] of ``values``, which broadcast against x."""
        values = values.expand(torch.broadcast_shapes(values.shape, self.x.shape[-1:]))
        if isinstance(self.spec.scale, PerGroup):
            values = values.unflatten(-1, (-1, self.spec.scale.size)).amax(-1)
        return _amax(values, self.scale_shape)

    def codes(self, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        step = repeat_groups(scale, self.spec)
        return ((self.x - self._shift(step, offset)) / step).round_().clamp_(self.spec.qn, self.spec.qp)

    def _shift(self, step: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor | float:
        return step / 2 if self.half else 0.0 if offset is None else offset

    def error(self, scale: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """Squared error [scale_shape]."""
        step = repeat_groups(scale, self.spec)
        return self.sum_scale((self.codes(scale, offset) * step + self._shift(step, offset) - self.x).square_())

    def grid(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        spec, x = self.spec, self.x
        if self.offset_shape is None:
            largest = _amax(self._peaks(), self.scale_shape)
            reach = spec.qp + 0.5 if self.half else max(spec.qp, -spec.qn)
        else:
            count = torch.ones_like(x).sum_to_size(self.offset_shape)
            mean = x.sum_to_size(self.offset_shape) / count
            low, high = -_amax(-x, self.offset_shape), _amax(x, self.offset_shape)
        best = None
        for t in torch.logspace(0, -2, _GRID).tolist():
            if self.offset_shape is None:
                scale, offset = (t * largest / reach).clamp_min(_SMALLEST), None
            else:
                below, above = mean - t * (mean - low), mean + t * (high - mean)
                scale = (self.max_scale(above - below) / (spec.qp - spec.qn)).clamp_min(_SMALLEST)
                centre = (below + above) / 2
                step = repeat_groups(scale, spec).mean() if self.tied else scale
                offset = centre - step * (spec.qp + spec.qn) / 2
            error = self.error(scale, offset)
            if self.tied:
                error = error.sum().expand(self.scale_shape)
            if best is None:
                best = [error, scale, offset]
                continue
            better = error < best[0]
            best[0] = torch.where(better, error, best[0])
            best[1] = torch.where(better, scale, best[1])
            if offset is not None:
                best[2] = torch.where(better if not self.tied else better.flatten()[0], offset, best[2])
        assert best is not None
        return best[1], best[2]

    def _peaks(self) -> torch.Tensor:
        peaks = self.x.abs()
        return peaks.unflatten(-1, (-1, self.spec.scale.size)).amax(-1) if isinstance(self.spec.scale, PerGroup) else peaks

    def refine(self, scale: torch.Tensor, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        for _ in range(_REFINEMENTS):
            codes = self.codes(scale, offset)
            if offset is not None:
                count = torch.ones_like(self.x).sum_to_size(offset.shape)
                offset = (self.x - codes * repeat_groups(scale, self.spec)).sum_to_size(offset.shape) / count
            level = codes + 0.5 if self.half else codes
            target = self.x if offset is None else self.x - offset
            energy = self.sum_scale(level.square())
            solved = self.sum_scale(level * target) / energy.clamp_min(_SMALLEST)
            # Where every code is zero the step is free, and the one at hand stays.
            scale = torch.where((energy > 0) & (solved > _SMALLEST), solved, scale)
        return scale, offset


def _amax(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The largest of ``values`` over the dimensions along which ``shape`` has extent one, or which it lacks."""
    padded = (1,) * (values.dim() - len(shape)) + tuple(shape)
    over = [d for d in range(values.dim()) if padded[d] == 1 and values.shape[d] != 1]
    return (values.amax(over, keepdim=True) if over else values).reshape(shape)
