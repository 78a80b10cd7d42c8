"""Attention's constants behind q, k and v."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from qvit.engines.cuda.folded.arrays import Constants, by_channel
from qvit.engines.cuda.folded.margins import unit
from qvit.integer import ops
from qvit.spec import HalfStep

_F32 = np.float32
_FEW_CODES = 15  # of the map: to look at its boundaries is less work than to look at its values ..
# .. if they are seldom near to a score, scores being this far apart (natural logarithms). Counted on one image, 4 bits, random
# weights: 0.17 boundaries a row of DeiT-T (5e-4) are near to a score, 0.10 of DeiT-S (1e-3), and 0.01 of both near to one that
# the row has. Looking at all values, some are in doubt in every fourth or fifth 16 rows, and those are computed again.
_COARSE = 2.5e-4


@dataclass(frozen=True, eq=False)
class AttentionConstants:
    """Attention's scales on the device.

    Attributes:
        score_scale, map_scale: float32 [H].
        value_scale, value_row: float32 [H D]; the second only where v has a learned offset.
        value_offset: 0 none, 1 half a step, 2 learned.
        q_half: whether q has a half step.
        v_signed: whether v's codes are.
        map_high: highest code of the map.
        map_unit: the unit of the map's relative errors in float32.
        row_check: whether boundaries between the map's codes are looked at instead of all its values.
        map_short: whether the map's codes fit 16 bits before they are clamped.
    """

    score_scale: torch.Tensor
    map_scale: torch.Tensor
    value_scale: torch.Tensor
    value_row: torch.Tensor | None
    value_offset: int
    q_half: bool
    v_signed: bool
    map_high: int
    map_unit: float
    row_check: bool
    map_short: bool

    @classmethod
    def of(cls, attention: ops.Attention, to: Constants) -> AttentionConstants:
        """The constants of a block's attention."""
        h, d = attention.heads, attention.head_dim
        q, k, v, p = attention.q, attention.k, attention.v, attention.map
        scale = q.scale.reshape(-1) * _F32(attention.factor) * _F32(0.5 if q.half_step else 1.0) * k.scale.reshape(-1)
        p_scale = np.broadcast_to(p.scale.reshape(-1), (h,))
        v_scale = by_channel(v.scale, (h, d))
        learned = v.offset is not None and not v.half_step
        row = p_scale[:, None] * by_channel(v.offset, (h, d)) if learned and v.offset is not None else None
        return cls(
            score_scale=to.floats(scale, h),
            map_scale=to.floats(p_scale, h),
            value_scale=to.floats((p_scale[:, None] * v_scale).reshape(-1), h * d),
            value_row=None if row is None else to.floats(row.reshape(-1), h * d),
            value_offset=2 if learned else int(isinstance(v.spec.offset, HalfStep)),
            q_half=q.half_step,
            v_signed=v.spec.signed,
            map_high=p.spec.qp,
            map_unit=unit(),
            row_check=p.spec.qp <= _FEW_CODES and float(scale.min()) >= _COARSE,
            map_short=float(p_scale.min()) >= 2.0**-14,
        )


@dataclass(frozen=True, eq=False)
class ValueConstants:
    """How sums of the second product become codes of proj's input.

    A code's place in its range is linear in two sums: ``(code - low) / (high - low) = gain * sum + row_gain * sum of the map's
    codes + shift``, rounded.

    Attributes:
        gain, row_gain, shift: float32 [H D].
        low, high: the codes' range.
        terms: largest ``|shift|``; ``|row_gain|`` of a sum of one; of a row whose codes add up to ``1 / p.scale``; in codes.
        binary_places: of the fixed-point numbers in which places are rounded.
    """

    gain: torch.Tensor
    row_gain: torch.Tensor
    shift: torch.Tensor
    low: int
    high: int
    terms: tuple[float, ...]
    binary_places: int

    @classmethod
    def of(cls, attention: ops.Attention, following: ops.Quantizer, to: Constants) -> ValueConstants:
        """The constants of a block's attention in front of ``following``."""
        shape, v, spec = (attention.heads, attention.head_dim), attention.v, following.spec
        count, span = shape[0] * shape[1], spec.qp - spec.qn
        p_scale = np.broadcast_to(attention.map.scale.reshape(-1, 1).astype(np.float64), shape)
        scale = (p_scale * by_channel(v.scale, shape)).reshape(-1)
        row = np.zeros(count)
        if isinstance(v.spec.offset, HalfStep):
            row = scale / 2
        elif v.offset is not None:
            row = (p_scale * by_channel(v.offset, shape)).reshape(-1)
        step = following.scale.astype(np.float64)
        shift = np.zeros(count) - (0.0 if following.offset is None else following.offset.astype(np.float64)) / step - spec.qn
        return cls(
            gain=to.floats((scale / step / span).astype(_F32), count),
            row_gain=to.floats((row / step / span).astype(_F32), count),
            shift=to.floats((shift / span).astype(_F32), count),
            low=spec.qn,
            high=spec.qp,
            terms=tuple(float(np.abs(a).max()) for a in (shift, row / step, row / p_scale.reshape(-1) / step)),
            binary_places=16 if span <= 127 else 14,
        )

    def near(self, most: int) -> int:
        """How near to the boundary between two codes a value is computed again, in units of the last binary place.

        In units of 2^-24, of a code c with terms a = sum, b = row sum and o = shift, where a <= c + b + o: the reference engine
        rounds two products, their sum, a difference and a quotient, a + b + 3 (c + 1) + o; here three constants, a row's and a
        value's sum are rounded, 2 a + 2 b + 2 o + c + 1; scales are products themselves, a + b.

        A row's values of the map add up to one, and a code is at most twice its value: not one at all below half a step.

        Args:
            most: largest sum of the map's codes of a row that so many of them can have.
        """
        shift, row, whole = self.terms
        code = max(abs(self.low), self.high) + 1
        error = unit() * (8 * min(most * row, 2.01 * whole) + 7 * (shift + abs(self.low)) + 8 * code)
        return min(math.ceil(error * 2**self.binary_places) + 1, 2 ** (self.binary_places - 1))
