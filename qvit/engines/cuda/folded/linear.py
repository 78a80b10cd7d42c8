"""A linear layer's constants, and those of the codes that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from qvit.engines.cuda import comparisons
from qvit.engines.cuda.comparisons import Comparisons
from qvit.engines.cuda.folded.arrays import COLUMN_PAD, Constants
from qvit.engines.cuda.layout import CHUNK, nibble_order, pad, planes, rest_twice, tiled, untiled
from qvit.engines.cuda.step_tables import StepTable, column_bytes, packed, slots
from qvit.integer import ops

_F32 = np.float32
# Channels of a LayerNorm whose codes go out as planes of bits: each lane of a warp has 32 of them (`src/norm.cu`).
MOST_NORMED_PLANES = 1024


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

    @cached_property
    def b_by_nibbles(self) -> torch.Tensor:
        """``b`` with k in the order in which a kernel has codes that lie two a byte, for a multiple of 256 of them."""
        return tiled(untiled(self.b)[:, nibble_order(self.k).to(self.b.device)])

    @cached_property
    def b_by_fours_and_nibbles(self) -> torch.Tensor:
        """Both: columns permuted, and k."""
        return _by_fours(self.b_by_nibbles)

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
        steps: int32 [M, 4], a table of them, or comparisons, which give planes of bits.

    Attributes:
        column_bytes: that a kernel reads of a column.
    """

    def __init__(self, to: Constants, steps: np.ndarray | StepTable | Comparisons) -> None:
        self._to, self._steps = to, steps
        if isinstance(steps, Comparisons):
            self.column_bytes = steps.column_bytes
        else:
            self.column_bytes = column_bytes(steps.entries.shape[1]) if isinstance(steps, StepTable) else 16
        self._kept: dict[tuple[int, bool, bool, bool], dict[str, torch.Tensor]] = {}

    def arrays(
        self, layer: LinearConstants, width: int, bits: bool, planes: bool = False, twice: bool = False
    ) -> dict[str, torch.Tensor]:
        """The kernel's ``b``, and ``steps`` int32 [M padded, 4] or ``table``, as `packed` of `qvit.engines.cuda.step_tables`
        or of `qvit.engines.cuda.comparisons` gives it.

        Args:
            layer: whose columns they are.
            width: columns of which a lane has a quarter, one after the other; divides 256.
            bits: whether the product is of planes of bits.
            planes: whether codes go out as such.
            twice: whether the rest of k lies there twice (`qvit.engines.cuda.layout.rest_twice`).
        """
        key = width, bits, planes, twice
        if key not in self._kept:
            b = layer.b_planes if bits else layer.b
            assert b is not None
            compares = isinstance(self._steps, Comparisons)
            columns = comparisons.slots(width, len(b)) if compares else slots(width, len(b), planes)
            rows = untiled(b)[torch.from_numpy(columns).to(b.device)]
            out = {"b": tiled(rest_twice(rows, layer.k) if twice else rows)}
            if isinstance(self._steps, StepTable):
                out["table"] = self._to.array(packed(self._steps, columns, width))
            elif isinstance(self._steps, Comparisons):
                out["table"] = self._to.array(comparisons.packed(self._steps, columns))
            else:
                padded = np.zeros((len(columns), self._steps.shape[1]), self._steps.dtype)
                padded[: len(self._steps)] = self._steps
                out["steps"] = self._to.array(padded[columns])
            self._kept[key] = out
        return self._kept[key]
