"""An `IntegerModel`'s constants as the CUDA kernels read them: padded, folded, on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from qvit.engines.cuda.layout import CHUNK, pad, planes, tiled, untiled
from qvit.engines.cuda.ramps import ramps
from qvit.engines.cuda.step_tables import StepTable, column_bytes, packed, slots, step_table
from qvit.engines.cuda.thresholds import activation_steps, linear_steps
from qvit.engines.tables import pixel_codes
from qvit.errors import UnsupportedModelError
from qvit.integer import ops
from qvit.integer.model import IntegerModel
from qvit.spec import HalfStep, PerGroup, PerToken, QuantSpec

_F32 = np.float32
_ULPS = 1e-6  # relative error that the float32 steps stay below
_FEW_CODES = 15  # of the map: to look at its boundaries is less work than to look at its values ..
# .. if they are seldom near to a score, scores being this far apart (natural logarithms). Counted on one image, 4 bits, random
# weights: 0.17 boundaries a row of DeiT-T (5e-4) are near to a score, 0.10 of DeiT-S (1e-3), and 0.01 of both near to one that
# the row has. Looking at all values, some are in doubt in every fourth or fifth 16 rows, and those are computed again.
_COARSE = 2.5e-4
COLUMN_PAD = 256  # output channels are padded to a multiple: no tile is wider
HEAD_DIMS = (32, 64)
# Channels of a LayerNorm whose codes go out as planes of bits: each lane of a warp has 32 of them (`src/norm.cu`).
MOST_NORMED_PLANES = 1024
MOST_WINDOW_TOKENS = 576  # every GPU's shared memory holds the keys and values of one head of such a window


def check(model: IntegerModel) -> None:
    """Raises `UnsupportedModelError` where the kernels do not know what the model does; the message names it."""

    def refuse(what: str) -> None:
        raise UnsupportedModelError(f"The CUDA engine does not run {what} yet: use engine='reference' on device='cuda'.")

    for layer in model.linears():
        for what, spec in (("input", layer.input.spec), ("weight", layer.weight.spec)):
            if isinstance(spec.scale, (PerToken, PerGroup)):
                refuse(f"{layer.name}.{what}'s scale per {'token' if isinstance(spec.scale, PerToken) else 'group'}")
        if layer.weight.half_step and layer.weight.spec.bits == 8:
            refuse(f"{layer.name}.weight, 8 bits at odd half steps")
    for block in model.blocks:
        attention = block.attention
        if attention.head_dim not in HEAD_DIMS:
            refuse(f"heads of {attention.head_dim} channels, only of {' or '.join(map(str, HEAD_DIMS))}")
        if attention.windows is not None and attention.windows.area > MOST_WINDOW_TOKENS:
            refuse(f"windows of {attention.windows.area} tokens, only of {MOST_WINDOW_TOKENS} at most")
        for what in ("q", "k", "v", "map"):
            quantizer: ops.Quantizer = getattr(attention, what)
            if isinstance(quantizer.spec.scale, PerToken):
                refuse(f"{block.name}.attn.{what}'s scale per token")
            if what in ("q", "k") and quantizer.spec.qp > 127:
                refuse(f"{block.name}.attn.{what}, unsigned at 8 bits")
        if attention.q.spec.learns_offset:
            refuse(f"{block.name}.attn.q's learned offset")


class Constants:
    """Moves arrays to a device, each once.

    Attributes:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def floats(self, values: Any, count: int, padded: int | None = None, fill: float = 0.0) -> torch.Tensor:
        """float32 [padded], ``values`` broadcast to [count] in front."""
        out = np.full(padded or count, fill, _F32)
        out[:count] = np.broadcast_to(np.asarray(values, _F32).reshape(-1), (count,)) if np.size(values) == 1 else values
        return torch.from_numpy(out).to(self.device)

    def array(self, values: np.ndarray) -> torch.Tensor:
        """An array as it is."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


@dataclass(frozen=True, eq=False)
class LinearConstants:
    """A linear layer on the device.

    Attributes:
        b: int8 [M padded, K padded], codes as they lie in memory; ``2 c + 1`` where the weight has half steps.
        b_planes: uint8 [M padded, bytes], the same as planes of bits, where both operands have two bits; else ``None``.
        scale, bias: float32 [M padded], the reference engine's.
        m, k: output and input features.
        signed: whether the input's codes are.
        half: whether sums are halved.
    """

    b: torch.Tensor
    b_planes: torch.Tensor | None
    scale: torch.Tensor
    bias: torch.Tensor
    m: int
    k: int
    signed: bool
    half: bool

    @cached_property
    def b_by_fours(self) -> torch.Tensor:
        """``b`` with columns permuted, so that a lane's four of every sixteen are neighbours."""
        return _by_fours(self.b)

    @cached_property
    def b_planes_by_fours(self) -> torch.Tensor | None:
        """``b_planes`` with columns permuted that way."""
        return None if self.b_planes is None else _by_fours(self.b_planes)

    @classmethod
    def of(cls, layer: ops.Linear, to: Constants, behind_norm: bool = False) -> LinearConstants:
        """The constants of a layer, and whether its input is a LayerNorm's."""
        m, k = layer.weight.shape
        codes = layer.weight.codes()
        b = np.zeros((pad(m, COLUMN_PAD), pad(k, CHUNK)), np.int8)
        b[:m, :k] = 2 * codes + 1 if layer.weight.half_step else codes
        codes_of_two_bits = layer.weight.spec.bits == 2 and layer.input.spec.bits == 2
        plain = not layer.weight.half_step and not layer.input.spec.signed and k % 32 == 0
        plain &= not behind_norm or k <= MOST_NORMED_PLANES
        scale = layer.input.scale * layer.weight.scale.reshape(-1)
        bias = layer.folded_bias()
        return cls(
            b=tiled(to.array(b)),
            b_planes=tiled(planes(to.array(b[:, :k]))) if codes_of_two_bits and plain else None,
            scale=to.floats(scale, m, len(b)),
            bias=to.floats(0.0 if bias is None else bias, m, len(b)),
            m=m,
            k=k,
            signed=layer.input.spec.signed,
            half=layer.weight.half_step,
        )


def _by_fours(b: torch.Tensor) -> torch.Tensor:
    return tiled(untiled(b)[torch.from_numpy(slots(16, len(b))).to(b.device)])


@dataclass(frozen=True, eq=False)
class CodeConstants:
    """How floats become the codes of a linear input [C].

    Attributes:
        step, inverse, offset: float32 [C padded].
        low, high: the codes' range.
    """

    step: torch.Tensor
    inverse: torch.Tensor
    offset: torch.Tensor
    low: float
    high: float

    @classmethod
    def of(cls, quantizer: ops.Quantizer, channels: int, to: Constants) -> CodeConstants:
        """The constants of a linear layer's input."""
        padded = pad(channels, COLUMN_PAD)
        offset = 0.0 if quantizer.offset is None else quantizer.offset
        return cls(
            step=to.floats(quantizer.scale, channels, padded, 1.0),
            inverse=to.floats(_F32(1) / quantizer.scale, channels, padded, 1.0),
            offset=to.floats(offset, channels, padded),
            low=float(quantizer.spec.qn),
            high=float(quantizer.spec.qp),
        )


class Permuted:
    """What an epilogue reads of each column in the order that its kernel wants, and the weight in the same order.

    Args:
        steps: int32 [M, 4], or a table of them.

    Attributes:
        column_bytes: that a kernel reads of a column.
    """

    def __init__(self, to: Constants, steps: np.ndarray | StepTable) -> None:
        self._to, self._steps = to, steps
        self.column_bytes = column_bytes(steps.entries.shape[1]) if isinstance(steps, StepTable) else 16
        self._kept: dict[tuple[int, bool, bool], dict[str, torch.Tensor]] = {}

    def arrays(self, layer: LinearConstants, width: int, bits: bool, planes: bool = False) -> dict[str, torch.Tensor]:
        """The kernel's ``b``, and ``steps`` int32 [M padded, 4] or ``table`` (`qvit.engines.cuda.step_tables.packed`).

        Args:
            layer: whose columns they are.
            width: columns of which a lane has a quarter, one after the other; divides 256.
            bits: whether the product is of planes of bits.
            planes: whether codes go out as such.
        """
        key = width, bits, planes
        if key not in self._kept:
            b = layer.b_planes if bits else layer.b
            assert b is not None
            columns = slots(width, len(b), planes)
            out = {"b": tiled(untiled(b)[torch.from_numpy(columns).to(b.device)])}
            if isinstance(self._steps, StepTable):
                out["table"] = self._to.array(packed(self._steps, columns, width))
            else:
                padded = np.zeros((len(columns), self._steps.shape[1]), self._steps.dtype)
                padded[: len(self._steps)] = self._steps
                out["steps"] = self._to.array(padded[columns])
            self._kept[key] = out
        return self._kept[key]


@dataclass(frozen=True, eq=False)
class ActivationConstants:
    """The table of the codes behind an activation.

    Attributes:
        cells: of a channel's table; 0 where there is no table.
        permuted: the table; ``None`` where there is none.
        why_not: why there is none.
    """

    cells: int
    permuted: Permuted | None
    why_not: str | None = None

    @classmethod
    def of(cls, layer: ops.Linear, following: ops.Quantizer, activation: str, to: Constants) -> ActivationConstants:
        """The table for a layer, an activation and the quantizer of what leaves it."""
        steps = activation_steps(layer, following, activation)
        table = steps if isinstance(steps, str) else step_table(steps)
        if isinstance(table, str):
            return cls(0, None, table)
        return cls(table.entries.shape[1], Permuted(to, table))


def activation_margin(quantizer: ops.Quantizer) -> float:
    """How near to the boundary between two codes an activation is computed again."""
    spec, step = quantizer.spec, float(quantizer.scale.min())
    offset = 0.0 if quantizer.offset is None else float(np.abs(quantizer.offset).max())
    return min(_ULPS * (spec.qp - spec.qn + 1) + (6e-7 + 3e-7 * offset) / step, 1.0)


def _margin(spec: QuantSpec, shift: np.ndarray) -> float:
    return min(_ULPS * (max(spec.qp, -spec.qn) + 1 + float(np.abs(shift).max())), 1.0)


def _place_margins(spec: QuantSpec, gain: np.ndarray, shift: np.ndarray, offset: np.ndarray) -> tuple[float, float]:
    """How far a place in `src/few_norm.cuh` is from the reference engine's value, in codes, at most: a + b E[x^2] / Var[x].

    In units of 2^-24: mean and E[x^2] have seven roundings behind each other, two of their factor, one for every 128 channels.
    The variance has three times as many of E[x^2], its root's inverse half of that, and six of its own. The mean's own meet the
    gain. Constants, differences and the place have six together, the reference engine's value three, of which one is of a value
    with its offset still in it. Places have half of their last binary place.
    """
    reach = max(spec.qp, -spec.qn) + 1 + float(np.abs(shift).max(initial=0.0))
    depth, ulp = 9 + -(-len(gain) // 128), _ULPS / 16
    most, moved = float(np.abs(gain).max(initial=0.0)), float(np.abs(offset).max(initial=0.0))
    a = 2.0 ** (-16 if spec.qp - spec.qn > 127 else -17) + ulp * (20 * reach + depth * most + moved)
    return a, ulp * ((1.5 * depth + 3) * reach + depth * most)


@dataclass(frozen=True, eq=False)
class NormConstants:
    """A LayerNorm, and the codes behind it if there are any.

    Attributes:
        weight, bias: float32 [C].
        eps: of the variance.
        gain, shift: float32 [C], both affine parts in one; ``None`` without codes.
        codes: of the next input, or ``None``.
        margin: how near to the boundary between two codes a value is computed again.
        place_gain, place_shift: float32 [C], as ``gain`` and ``shift``, to places in the codes' range, 0 to 1.
        place_margins: as ``margin``, of places, in codes: a + b E[x^2] / Var[x].
    """

    weight: torch.Tensor
    bias: torch.Tensor
    eps: float
    gain: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    codes: CodeConstants | None = None
    margin: float = 0.0
    place_gain: torch.Tensor | None = None
    place_shift: torch.Tensor | None = None
    place_margins: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, norm: ops.LayerNorm, quantizer: ops.Quantizer | None, to: Constants) -> NormConstants:
        """The constants of a LayerNorm in front of a quantizer, or of one that gives floats."""
        n = len(norm.weight)
        weight, bias = to.floats(norm.weight, n), to.floats(norm.bias, n)
        if quantizer is None:
            return cls(weight, bias, norm.eps)
        scale = np.broadcast_to(quantizer.scale.astype(np.float64), (n,))
        offset = 0.0 if quantizer.offset is None else quantizer.offset.astype(np.float64)
        gain, shift = (norm.weight / scale).astype(_F32), ((norm.bias - offset) / scale).astype(_F32)
        low, span = quantizer.spec.qn, quantizer.spec.qp - quantizer.spec.qn
        return cls(
            weight,
            bias,
            norm.eps,
            gain=to.floats(gain, n),
            shift=to.floats(shift, n),
            codes=CodeConstants.of(quantizer, n, to),
            margin=_margin(quantizer.spec, shift),
            place_gain=to.floats((norm.weight / scale / span).astype(_F32), n),
            place_shift=to.floats((((norm.bias - offset) / scale - low) / span).astype(_F32), n),
            place_margins=_place_margins(quantizer.spec, gain, shift, offset / scale),
        )


@dataclass(frozen=True, eq=False)
class HeadConstants:
    """q, k and v from the sums of qkv; arrays are float32 [3 C padded].

    Attributes:
        gain, shift: standardised values to codes; in v's columns ``gain`` is one over the step.
        weight, affine: IRM's affine part.
        offset, step: of the codes.
        ranges: lowest and highest code of q, k and v.
        margins: of q and k.
        rectify: whether there is IRM.
        eps: of the standardisation.
        doubled: whether q is stored as ``2 c + 1``.
        permuted: constants of the columns as `src/epilogue_heads.cuh` wants them; ``None`` where it computes the other way.
        why_not: why it does.
        permuted_margins: margins of q and k that way, and what is added to them.
    """

    gain: torch.Tensor
    shift: torch.Tensor
    weight: torch.Tensor
    affine: torch.Tensor
    offset: torch.Tensor
    step: torch.Tensor
    ranges: tuple[tuple[float, float], ...]
    margins: tuple[float, ...]
    rectify: bool
    eps: float
    doubled: bool
    permuted: Permuted | None
    why_not: str | None
    permuted_margins: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, attention: ops.Attention, layer: ops.Linear, to: Constants) -> HeadConstants:
        """The constants of a block's attention behind ``layer``."""
        shape, columns = (attention.heads, attention.head_dim), attention.heads * attention.head_dim
        arrays: dict[str, list[np.ndarray]] = {key: [] for key in ("gain", "shift", "weight", "affine", "offset", "step")}
        margins = []
        parts = (
            (attention.q, attention.rectify_q),
            (attention.k, attention.rectify_k),
            (attention.v, None),
        )
        for quantizer, rectify in parts:
            step = _by_channel(quantizer.scale, shape)
            offset = np.zeros(shape, _F32) if quantizer.offset is None else _by_channel(quantizer.offset, shape)
            weight = np.ones(shape, _F32) if rectify is None else rectify.weight
            affine = np.zeros(shape, _F32) if rectify is None else rectify.bias
            shift = ((affine - offset.astype(np.float64)) / step).astype(_F32)
            gain = (1 / step).astype(_F32) if rectify is None else (weight / step.astype(np.float64)).astype(_F32)
            margins.append(_margin(quantizer.spec, shift))
            for key, array in (
                ("gain", gain),
                ("shift", shift),
                ("weight", weight),
                ("affine", affine),
                ("offset", offset),
                ("step", step),
            ):
                arrays[key].append(array.reshape(-1))
        padded = pad(3 * columns, COLUMN_PAD)
        moved = {
            key: to.floats(np.concatenate(parts), 3 * columns, padded, 1.0 if key == "step" else 0.0)
            for key, parts in arrays.items()
        }
        steps = _head_steps(attention, layer, {key: np.concatenate(parts) for key, parts in arrays.items()})
        return cls(
            permuted=None if isinstance(steps, str) else Permuted(to, steps),
            why_not=steps if isinstance(steps, str) else None,
            permuted_margins=tuple(_row_margins(quantizer, rectify) for quantizer, rectify in parts[:2]),
            **moved,
            ranges=tuple((float(s.spec.qn), float(s.spec.qp)) for s in (attention.q, attention.k, attention.v)),
            margins=tuple(margins[:2]),
            rectify=attention.rectify_q is not None,
            eps=attention.rectify_q.eps if attention.rectify_q is not None else 0.0,
            doubled=doubles_q(attention),
        )


_RECTIFIED_CODES = 128  # of a rectified q or k: more do not leave 16 bits behind the point


def _head_steps(attention: ops.Attention, layer: ops.Linear, arrays: dict[str, np.ndarray]) -> np.ndarray | str:
    """int32 [3 C, 4] as `src/epilogue_heads.cuh` wants them, or why there are none."""
    width = attention.heads * attention.head_dim
    out = np.zeros((3 * width, 4), np.int32)
    half = _F32(0.5 if layer.weight.half_step else 1.0)
    scale = np.broadcast_to(layer.input.scale * layer.weight.scale.reshape(-1), (3 * width,)).astype(_F32) * half
    for index, (quantizer, rectify) in enumerate(
        ((attention.q, attention.rectify_q), (attention.k, attention.rectify_k), (attention.v, None))
    ):
        columns, spec = slice(index * width, (index + 1) * width), quantizer.spec
        if rectify is None:
            steps = linear_steps(layer, columns, arrays["step"][columns], arrays["offset"][columns], spec)
            lowest = 0 if index == 0 and doubles_q(attention) else spec.qn
            found = steps if isinstance(steps, str) else ramps(steps, scale[columns] / arrays["step"][columns], lowest)
            if isinstance(found, str):
                return f"{'qkv'[index]}: {found}"
            out[columns] = found.astype(np.uint32).view(np.int32)
            continue
        if spec.qp - spec.qn >= _RECTIFIED_CODES:
            return f"{'qkv'[index]}: {spec.qp - spec.qn + 1} codes behind a standardisation, more than {_RECTIFIED_CODES}"
        folded = layer.folded_bias()
        bias = np.zeros(width, _F32) if folded is None else folded[columns]
        codes = spec.qp - spec.qn
        shift = (arrays["affine"][columns] - arrays["offset"][columns].astype(np.float64)) / arrays["step"][columns] - spec.qn
        gain = arrays["weight"][columns] / arrays["step"][columns].astype(np.float64) / codes
        numbers = np.stack([scale[columns], bias, gain, shift / codes], 1).astype(_F32).reshape(-1, 2, 2, 2)
        out[columns] = numbers.transpose(0, 2, 1, 3).reshape(-1, 4).view(np.int32)
    return out


def _row_margins(quantizer: ops.Quantizer, rectify: ops.Rectify | None) -> tuple[float, float]:
    """How far a code between two neighbours is from what the rectified kernel computes, at most: a + b E[y^2] / Var[y]."""
    if rectify is None:
        return 0.0, 0.0
    spec, step, ulp = quantizer.spec, quantizer.scale.astype(np.float64), _ULPS / 16
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


def doubles_q(attention: ops.Attention) -> bool:
    """Whether q's codes and their half step fit a byte together."""
    return attention.q.half_step and 2 * attention.q.spec.qp + 1 <= 127


@dataclass(frozen=True, eq=False)
class AttentionConstants:
    """Attention's scales on the device.

    Attributes:
        score_scale, map_scale: float32 [H].
        value_scale, value_row: float32 [H D]; the second only where v has a learned offset.
        value_offset: 0 none, 1 half a step, 2 learned.
        q_half: whether q has a half step.
        v_signed: whether v's codes are.
        map_high, map_margin: highest code of the map, and how near to a boundary it is computed again.
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
    map_margin: float
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
        v_scale = _by_channel(v.scale, (h, d))
        learned = v.offset is not None and not v.half_step
        row = p_scale[:, None] * _by_channel(v.offset, (h, d)) if learned and v.offset is not None else None
        return cls(
            score_scale=to.floats(scale, h),
            map_scale=to.floats(p_scale, h),
            value_scale=to.floats((p_scale[:, None] * v_scale).reshape(-1), h * d),
            value_row=None if row is None else to.floats(row.reshape(-1), h * d),
            value_offset=2 if learned else int(isinstance(v.spec.offset, HalfStep)),
            q_half=q.half_step,
            v_signed=v.spec.signed,
            map_high=p.spec.qp,
            map_margin=3 * _ULPS * (p.spec.qp + 1),
            map_unit=_ULPS / 1e-6 * 2.0**-24,
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
        scale = (p_scale * _by_channel(v.scale, shape)).reshape(-1)
        row = np.zeros(count)
        if isinstance(v.spec.offset, HalfStep):
            row = scale / 2
        elif v.offset is not None:
            row = (p_scale * _by_channel(v.offset, shape)).reshape(-1)
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
        error = _ULPS / 1e-6 * 2.0**-24 * (8 * min(most * row, 2.01 * whole) + 7 * (shift + abs(self.low)) + 8 * code)
        return min(math.ceil(error * 2**self.binary_places) + 1, 2 ** (self.binary_places - 1))


def _by_channel(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[1], [H, 1, 1] or [H, 1, D] -> float32 [H, D]."""
    return np.ascontiguousarray(np.broadcast_to(values if values.ndim == 1 else values[:, 0, :], shape), _F32)


@dataclass(frozen=True, eq=False)
class PixelConstants:
    """Codes of pixels: of 8-bit ones a table, computed as the reference engine computes them.

    Attributes:
        codes: uint8 [channels, 256].
        identity: whether pixels are their own codes.
        std, offset: float32 [channels].
        step, high: of the codes.
    """

    codes: torch.Tensor
    identity: bool
    std: torch.Tensor
    offset: torch.Tensor
    step: float
    high: float

    @classmethod
    def of(cls, model: IntegerModel, to: Constants) -> PixelConstants:
        """The constants of a model's patch embedding."""
        patch, preprocessing, channels = model.patch.input, model.preprocessing, model.architecture.in_chans
        assert patch.offset is not None
        offset = patch.offset.reshape(channels, -1)[:, 0]
        codes = pixel_codes(model)
        return cls(
            codes=to.array(codes),
            identity=bool((codes == np.arange(256)).all()),
            std=to.array(np.asarray(preprocessing.std, _F32)),
            offset=to.array(offset),
            step=float(patch.scale[0]),
            high=float(patch.spec.qp),
        )
