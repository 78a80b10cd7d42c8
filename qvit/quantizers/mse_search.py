"""The scale and offset with the least squared error on a sample of values: a grid, then alternating least squares.

Used by calibration, never by a forward pass. The error has many local minima, outliers above all, and the least squares only
find the nearest one; so the grid has to look at enough of them. On inputs of fc2 (behind GELU), trying several places for the
range of the codes instead of one took an eighth to four ninths off the error at 2 to 4 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from qvit.spec import HalfStep, PerGroup, QuantSpec

_SMALLEST = 1e-8
_WIDTHS = 48  # scales tried, geometric from the widest useful one down to about a hundredth of it
_WIDTHS_WITH_OFFSET = 24  # the same where each is tried with several offsets
_BETWEEN = (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75)  # then between the best scale and its neighbours, in steps of that series
_HOPELESS = 4.0  # the series ends once every error is this many times the least
# Where the range of the codes is placed, for each scale: evenly from the smallest value upwards to the largest downwards ..
_PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
# .. and with the mean at these fractions of the range (at 2 bits, on a level or between two).
_MEANS = (1 / 3, 1 / 2, 2 / 3)
_REFINEMENTS = 12


def mse_optimal(
    x: torch.Tensor, spec: QuantSpec, scale_shape: tuple[int, ...], offset_shape: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and offset that minimise ``sum (value - x)^2`` over the sample.

    From the best point of the grid, scale and offset are solved for in turn with the codes held fixed (Lloyd's iteration
    restricted to uniform levels), which only lowers the error.

    Where one offset serves several scales (a scale per token with an offset per channel, say), the grid cannot choose for each
    scale by itself: offsets are found with one scale for all that they tie together, then scales with these offsets.

    Args:
        x: sample, batch first: [S, K], [S, N, K], [S, H, N, D] or, for a weight, [M, K].
        spec: code range and granularity.
        scale_shape: shape of the scale, broadcastable against ``x`` (`QuantSpec.scale_shape`).
        offset_shape: shape of the learned offset, or ``None``.

    Returns:
        ``(scale, offset)`` of these shapes, float32; ``offset`` is ``None`` where none is learned.
    """
    x, scale_shape = x.detach().float(), tuple(scale_shape)
    problem = _Problem(x, spec, scale_shape, spec.scale.size if isinstance(spec.scale, PerGroup) else 1)
    if offset_shape is None:
        return problem.refine(problem.best_scale(None), None)
    common = _common_shape(scale_shape, tuple(offset_shape), problem.group)
    if common == scale_shape:
        return problem.refine(*problem.best_scale_and_offset(tuple(offset_shape)))
    coarse = _Problem(x, spec, common, 1)
    _, offset = coarse.refine(*coarse.best_scale_and_offset(tuple(offset_shape)))
    return problem.refine(problem.best_scale(offset), offset)


def _common_shape(scale: tuple[int, ...], offset: tuple[int, ...], group: int) -> tuple[int, ...]:
    """The finest shape of a scale, no finer than ``scale``, each entry of which has offsets of its own."""
    if group > 1:
        return scale if offset[-1] > 1 else (1,)
    rank = max(len(scale), len(offset))
    pairs = zip((1,) * (rank - len(scale)) + scale, (1,) * (rank - len(offset)) + offset, strict=True)
    common = tuple(s if s == o else 1 for s, o in pairs)
    # Leading ones go, so that what has the shape of the offset can be summed to this shape.
    return scale if math.prod(common) == math.prod(scale) else common[rank - len(offset) :]


class _Problem:
    """One sample, with its reductions over whatever shares a scale (``group`` consecutive channels of a `PerGroup`)."""

    def __init__(self, x: torch.Tensor, spec: QuantSpec, scale_shape: tuple[int, ...], group: int) -> None:
        self.x, self.spec, self.scale_shape, self.group = x, spec, scale_shape, group
        self.half = isinstance(spec.offset, HalfStep)

    def steps(self, scale: torch.Tensor) -> torch.Tensor:
        """The scale, broadcastable against x."""
        return scale.repeat_interleave(self.group, dim=-1) if self.group > 1 else scale

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum [scale_shape] of ``values``."""
        return (values.unflatten(-1, (-1, self.group)).sum(-1) if self.group > 1 else values).sum_to_size(self.scale_shape)

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The largest [scale_shape] of ``values``."""
        return _amax(values.unflatten(-1, (-1, self.group)).amax(-1) if self.group > 1 else values, self.scale_shape)

    def shifted(self, steps: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        return self.x - steps / 2 if self.half else self.x if offset is None else self.x - offset

    def codes(self, steps: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        return (self.shifted(steps, offset) / steps).round_().clamp_(self.spec.qn, self.spec.qp)

    def squared_error(self, steps: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        """Of every element."""
        target = self.shifted(steps, offset)
        return (target / steps).round_().clamp_(self.spec.qn, self.spec.qp).mul_(steps).sub_(target).square_()

    def best_scale(self, offset: torch.Tensor | None) -> torch.Tensor:
        """The best scale [scale_shape] of the grid, the offset given."""
        spec = self.spec
        peak = self.largest(self.x.abs() if offset is None else (self.x - offset).abs())
        # With an uneven code range, the widest useful scale puts the peak on the code of the shorter side.
        reach = spec.qp + 0.5 if self.half else min(spec.qp, -spec.qn) if spec.signed else spec.qp
        finest = 0.02 * reach / (spec.qp + 0.5)

        def tried(scale: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.total(self.squared_error(self.steps(scale), offset)), None

        return self._grid(peak / reach, finest, _WIDTHS, tried)[0]

    def best_scale_and_offset(self, offset_shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The best scale [scale_shape] and offset of the grid; each offset must belong to one scale."""
        spec, x = self.spec, self.x
        mean = x.sum_to_size(offset_shape) * (math.prod(offset_shape) / x.numel())
        low, high = -_amax(-x, offset_shape), _amax(x, offset_shape)
        span = (high - low).expand(torch.broadcast_shapes(offset_shape, x.shape[-1:])) if self.group > 1 else high - low

        def tried(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            steps = self.steps(scale)
            first, last = low - steps * spec.qn, high - steps * spec.qp
            offsets = [first + (last - first) * place for place in _PLACES]
            offsets += [mean - steps * (spec.qn + (spec.qp - spec.qn) * place) for place in _MEANS]
            error, best = None, offsets[0]
            for offset in offsets:
                its_error = self.squared_error(steps, offset).sum_to_size(offset_shape)
                if error is None:
                    error = its_error
                else:
                    best = torch.where(its_error < error, offset, best)
                    error = torch.minimum(error, its_error)
            assert error is not None
            return self.total(error), best

        scale, offset = self._grid(self.largest(span) / (spec.qp - spec.qn), 0.01, _WIDTHS_WITH_OFFSET, tried)
        assert offset is not None
        return scale, offset

    def _grid(
        self,
        widest: torch.Tensor,
        finest: float,
        count: int,
        tried: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The best of ``count`` scales from ``widest`` to ``finest * widest`` and of some between its neighbours.

        ``tried`` gives the error [scale_shape] of a scale and the offset that goes with it.
        """
        best_scale = widest.clamp_min(_SMALLEST)
        best_error, best_offset = tried(best_scale)
        ratio = finest ** (1 / (count - 1))

        def consider(scale: torch.Tensor) -> torch.Tensor:
            nonlocal best_scale, best_error, best_offset
            scale = scale.clamp_min(_SMALLEST)
            error, offset = tried(scale)
            better = error < best_error
            if offset is not None and best_offset is not None:
                best_offset = torch.where(self.steps(better), offset, best_offset)
            best_scale = torch.where(better, scale, best_scale)
            best_error = torch.where(better, error, best_error)
            return error

        for power in range(1, count):
            if bool((consider(widest * ratio**power) > _HOPELESS * best_error).all()):
                break
        centre = best_scale
        for part in _BETWEEN:
            consider(centre * ratio**part)
        return best_scale, best_offset

    def refine(self, scale: torch.Tensor, offset: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Least squares for offset and scale in turn, the codes of each round held fixed."""
        for _ in range(_REFINEMENTS):
            steps = self.steps(scale)
            codes = self.codes(steps, offset)
            if offset is not None:
                share = offset.numel() / self.x.numel()
                offset = (self.x - codes * steps).sum_to_size(offset.shape) * share
            level = codes + 0.5 if self.half else codes
            target = self.x if offset is None else self.x - offset
            energy = self.total(level.square())
            solved = self.total(level * target) / energy.clamp_min(_SMALLEST)
            # Where every code is zero the step is free, and the one at hand stays.
            scale = torch.where((energy > 0) & (solved > _SMALLEST), solved, scale)
        return scale, offset


def _amax(values: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The largest of ``values`` over the dimensions along which ``shape`` has extent one, or which it lacks."""
    padded = (1,) * (values.dim() - len(shape)) + tuple(shape)
    over = [d for d in range(values.dim()) if padded[d] == 1 and values.shape[d] != 1]
    return (values.amax(over, keepdim=True) if over else values).reshape(shape)
