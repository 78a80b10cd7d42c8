"""Quantized patch projection: the strided convolution of timm's PatchEmbed, as a linear layer over pixel codes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from qvit.layers.code_matmul import code_linear
from qvit.quantizers.lsq import LSQQuantizer
from qvit.quantizers.pixel import PixelQuantizer
from qvit.spec import Dims, PerChannel, PerTensor, QuantSpec, SpecError


def patches_of(images: torch.Tensor, patch: tuple[int, int]) -> torch.Tensor:
    """images [B, C, H, W] -> patches [B, N, C * ph * pw], row by row; pixels beyond the last whole patch are dropped."""
    b, c, h, w = images.shape
    ph, pw = patch
    rows, columns = h // ph, w // pw
    x = images[:, :, : rows * ph, : columns * pw].reshape(b, c, rows, ph, columns, pw)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * ph * pw)


class QuantPatchProjection(nn.Module):
    """Drop-in for the `torch.nn.Conv2d` inside timm's PatchEmbed (kernel = stride); takes over its parameters.

    Args:
        conv: the float convolution, weight [M, C, ph, pw].
        weight_spec, input_spec: how to quantize; the input's grid is that of the pixels (`PixelQuantizer`).
        mean, std: normalisation of the images that the model is fed, one a colour channel.

    Raises:
        SpecError: the input is to be quantized otherwise than as pixels are; only its bits may change.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        weight_spec: QuantSpec,
        input_spec: QuantSpec,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        if input_spec.signed or not isinstance(input_spec.scale, PerTensor) or not isinstance(input_spec.offset, PerChannel):
            raise SpecError(
                "patch_embed.proj.input is quantized as pixels are: override its bits, not its sign, scale or offset."
            )
        self.patch = (conv.kernel_size[0], conv.kernel_size[1])
        self.in_channels, self.out_features = conv.in_channels, conv.out_channels
        self.weight = conv.weight
        self.bias = conv.bias
        area = self.patch[0] * self.patch[1]
        self.input_quantizer = PixelQuantizer(input_spec, mean, std, area)
        self.weight_quantizer = LSQQuantizer(weight_spec, Dims(channels=self.in_channels * area, rows=self.out_features))

    def effective_weight(self) -> torch.Tensor:
        """The weight [M, C * ph * pw] that multiplies ``x * std``: each colour channel divided by its std."""
        return self.weight.flatten(1) / self.input_quantizer.std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, C, H, W], normalised -> [B, M, H / ph, W / pw], as the convolution gives them."""
        if not self.input_quantizer.enabled:
            weight = self.weight
            if self.weight_quantizer.enabled:
                value = self.weight_quantizer(self.effective_weight()).value
                weight = (value * self.input_quantizer.std).view_as(weight)
            return F.conv2d(images, weight, self.bias, stride=self.patch)
        source, weight = self.input_quantizer(patches_of(images, self.patch)), self.effective_weight()
        if self.weight_quantizer.enabled:
            y = code_linear(source, self.weight_quantizer(weight), self.bias)
        else:
            y = F.linear(source.value, weight, self.bias)
        rows, columns = images.shape[2] // self.patch[0], images.shape[3] // self.patch[1]
        return y.transpose(1, 2).unflatten(2, (rows, columns))
