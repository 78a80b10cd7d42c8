"""How sums of qkv become codes of q, k and v."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qvit.engines.cuda.folded.arrays import COLUMN_PAD, Constants, by_channel
from qvit.engines.cuda.folded.linear import Permuted
from qvit.engines.cuda.folded.margins import norm_margin, row_margins
from qvit.engines.cuda.layout import pad
from qvit.engines.cuda.ramps import ramps
from qvit.engines.cuda.thresholds import linear_steps
from qvit.integer import ops

_F32 = np.float32
_RECTIFIED_CODES = 128  # of a rectified q or k: more do not leave 16 bits behind the point


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
            step = by_channel(quantizer.scale, shape)
            offset = np.zeros(shape, _F32) if quantizer.offset is None else by_channel(quantizer.offset, shape)
            weight = np.ones(shape, _F32) if rectify is None else rectify.weight
            affine = np.zeros(shape, _F32) if rectify is None else rectify.bias
            shift = ((affine - offset.astype(np.float64)) / step).astype(_F32)
            gain = (1 / step).astype(_F32) if rectify is None else (weight / step.astype(np.float64)).astype(_F32)
            margins.append(norm_margin(quantizer.spec, gain, shift))
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
            permuted_margins=tuple(row_margins(quantizer, rectify) for quantizer, rectify in parts[:2]),
            **moved,
            ranges=tuple((float(s.spec.qn), float(s.spec.qp)) for s in (attention.q, attention.k, attention.v)),
            margins=tuple(margins[:2]),
            rectify=attention.rectify_q is not None,
            eps=attention.rectify_q.eps if attention.rectify_q is not None else 0.0,
            doubled=doubles_q(attention),
        )


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


def doubles_q(attention: ops.Attention) -> bool:
    """Whether q's codes and their half step fit a byte together."""
    return attention.q.half_step and 2 * attention.q.spec.qp + 1 <= 127
