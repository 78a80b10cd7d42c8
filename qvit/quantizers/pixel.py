"""The quantizer in front of the patch embedding: its codes are the pixels.

An image that was decoded to b-bit pixels and normalised, ``x = (pixel / (2^b - 1) - mean) / std``, loses nothing if the
quantizer undoes exactly that. The scale must not depend on the input channel (`qvit.spec`), so std moves into the weights
(equalisation by a known factor) and mean becomes the offset per channel: ``x * std = code / (2^b - 1) - mean``.
"""

from __future__ import annotations

import torch
from torch import nn

from qvit.quantizers.lsq import Quantized, lsq_quantize
from qvit.spec import QuantSpec


class PixelQuantizer(nn.Module):
    """Quantizes normalised patches to pixel codes with a fixed grid; nothing is learned, so nothing is calibrated.

    Args:
        spec: unsigned input spec, per-tensor scale, per-channel offset.
        mean, std: the normalisation of the images, one a colour channel, in units of the full pixel range.
        pixels_per_channel: values of one colour channel in a patch (patch height x width).
    """

    scale: torch.Tensor
    offset: torch.Tensor
    std: torch.Tensor

    def __init__(self, spec: QuantSpec, mean: tuple[float, ...], std: tuple[float, ...], pixels_per_channel: int) -> None:
        super().__init__()
        self.spec = spec
        self.enabled = True
        self.register_buffer("scale", torch.tensor([1.0 / spec.qp]))
        offset = -torch.tensor(mean, dtype=torch.float32).repeat_interleave(pixels_per_channel)
        self.register_buffer("offset", offset)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).repeat_interleave(pixels_per_channel))

    def forward(self, patches: torch.Tensor) -> Quantized:
        """patches [B, N, K], normalised, K = colour channels x patch height x patch width -> codes of the pixels."""
        return lsq_quantize(patches.float() * self.std, self.scale, self.offset, self.spec)
