"""Codes of pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qvit.engines.cuda.folded.arrays import Constants
from qvit.engines.tables import pixel_codes
from qvit.integer.model import IntegerModel

_F32 = np.float32


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
