"""A LayerNorm's constants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qvit.engines.cuda.folded.arrays import Constants
from qvit.engines.cuda.folded.linear import CodeConstants
from qvit.engines.cuda.folded.margins import norm_margin, place_margins
from qvit.integer import ops

_F32 = np.float32


@dataclass(frozen=True, eq=False)
class NormConstants:
    """A LayerNorm, and the codes behind it if there are any.

    Attributes:
        weight, bias: float32 [C].
        eps: of the variance.
        gain, shift: float32 [C], both affine parts in one, for a norm behind a product; ``None`` without codes.
        codes: of the next input, or ``None``.
        margin: how near to the boundary between two codes a value is computed again there.
        place_gain, place_shift: float32 [C], as ``gain`` and ``shift``, to places in the codes' range, 0 to 1, for the
            other norms.
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
            margin=norm_margin(quantizer.spec, gain, shift),
            place_gain=to.floats((norm.weight / scale / span).astype(_F32), n),
            place_shift=to.floats((((norm.bias - offset) / scale - low) / span).astype(_F32), n),
            place_margins=place_margins(quantizer.spec, gain, shift, offset / scale),
        )
