"""Crop, resize and flip of a batch of images on their device, with Pillow's filters.

Pillow resizes by a weighted sum along the rows, then along the columns, each rounded to whole pixel values; where it shrinks,
the filter widens. Both sums are one batched matrix product here, with one matrix an image, so the result is Pillow's up to
rounding, on any device, without a loop over images. (Which of the two sums is first, and so where values beyond white or
black are cut, depends on the sizes in newer versions of Pillow; here the rows are.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def _bilinear(x: torch.Tensor) -> torch.Tensor:
    return (1 - x.abs()).clamp_min(0)


def _bicubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' cubic with a = -1/2, Pillow's."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _lanczos(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() < 3, torch.sinc(x) * torch.sinc(x / 3), 0.0)


FILTERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bilinear": _bilinear,
    "bicubic": _bicubic,
    "lanczos": _lanczos,
}


def resampling_matrix(
    start: torch.Tensor, length: torch.Tensor, extent: int, size: int, interpolation: str, flip: torch.Tensor | None = None
) -> torch.Tensor:
    """Weights that resize a stretch of ``length`` pixels to ``size`` pixels, one matrix an image.

    Args:
        start, length: [B], whole numbers; the stretch lies within ``extent`` pixels, and nothing outside it is read.
        extent: pixels there are.
        size: pixels wanted.
        interpolation: a key of `FILTERS`.
        flip: bool [B], reverse the result; never by default.

    Returns:
        float32 [B, size, extent]; rows sum to 1.
    """
    device = start.device
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    target = torch.arange(size, device=device, dtype=torch.float32)[None, :, None]
    if flip is not None:
        target = torch.where(flip[:, None, None], size - 1 - target, target)
    scale = length / size
    center = (target + 0.5) * scale  # from the start of the stretch
    pixel = torch.arange(extent, device=device, dtype=torch.float32) - start
    weight = FILTERS[interpolation]((pixel + 0.5 - center) / scale.clamp_min(1))
    weight = torch.where((pixel >= 0) & (pixel < length), weight, 0.0)
    return weight / weight.sum(-1, keepdim=True)


def _whole(x: torch.Tensor) -> torch.Tensor:
    """Rounded to pixel values, halves upwards."""
    return (x + 0.5).floor_().clamp_(0, 255)


@torch.no_grad()
def resized_crops(
    images: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: tuple[int, int], interpolation: str
) -> torch.Tensor:
    """What Pillow makes of each image by ``crop``, ``resize`` and, where it is flipped, ``transpose(FLIP_LEFT_RIGHT)``.

    Args:
        images: uint8 [B, C, H, W].
        boxes: [B, 4], (top, left, height, width), within the images.
        flips: bool [B].
        size: (height, width) of the result.
        interpolation: a key of `FILTERS`.

    Returns:
        float32 [B, C, *size], whole numbers in [0, 255].
    """
    b, c, h, w = images.shape
    top, left, height, width = boxes.unbind(1)
    across = resampling_matrix(left, width, w, size[1], interpolation, flips)
    down = resampling_matrix(top, height, h, size[0], interpolation)
    # Rows of all channels side by side, so that each pass is one product of one matrix an image.
    rows = images.transpose(1, 2).reshape(b, h * c, w).float()
    rows = _whole(torch.bmm(rows, across.transpose(1, 2))).view(b, h, c * size[1])
    return _whole(torch.bmm(down, rows)).view(b, size[0], c, size[1]).transpose(1, 2)
