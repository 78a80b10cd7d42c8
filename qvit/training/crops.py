"""Random crops and flips of whole epochs at once: numbers only, no pixels.

The boxes are drawn as timm's `RandomResizedCropAndInterpolation` draws them. Every choice is a function of (seed, epoch,
image, repeat): each epoch and repeat has a generator of its own (Philox, counter-based), and an image its own place in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qvit.training.sections import AugmentSection
from qvit.training.seeding import derive_seed

ATTEMPTS = 10  # boxes that are tried before the central crop is taken, as in timm
DRAWS = 4 * ATTEMPTS + 1  # numbers an image: area, ratio, top and left of every attempt, and the flip
_CHUNK = 1 << 16  # images whose draws are in memory together (21 MB)


@dataclass(frozen=True)
class Crops:
    """Where to crop each image, and whether to flip it.

    Attributes:
        boxes: int32 [images, 4], (top, left, height, width) in pixels.
        flips: bool [images].
    """

    boxes: np.ndarray
    flips: np.ndarray


def draw_crops(seed: int, epoch: int, repeat: int, images: int, size: tuple[int, int], augment: AugmentSection) -> Crops:
    """Crops of all images for their ``repeat``-th appearance in an epoch.

    Args:
        seed: of the run.
        epoch, repeat: as in `qvit.training.data.SampleKey`.
        images: number of images.
        size: (height, width) of all of them.
        augment: ``scale``, ``ratio`` and ``hflip`` are read.
    """
    generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, epoch, repeat)))
    parts = []
    for first in range(0, images, _CHUNK):
        draws = generator.random((min(_CHUNK, images - first), DRAWS))
        parts.append((crop_boxes(draws[:, :-1], size, augment), draws[:, -1] < augment.hflip))
    return Crops(np.concatenate([boxes for boxes, _ in parts]), np.concatenate([flips for _, flips in parts]))


def crop_boxes(draws: np.ndarray, size: tuple[int, int], augment: AugmentSection) -> np.ndarray:
    """Boxes from numbers in [0, 1).

    Args:
        draws: [images, 4 * attempts]; of each attempt in turn the area, the aspect ratio, the top and the left.
        size: (height, width) of the images.
        augment: ``scale`` and ``ratio`` are read.

    Returns:
        int32 [images, 4]: (top, left, height, width) of the first attempt that fits, else of the central crop.
    """
    h, w = size
    draws = draws.reshape(len(draws), -1, 4)
    (least, most), (narrow, wide) = augment.scale, augment.ratio
    area = (least + (most - least) * draws[..., 0]) * (h * w)
    aspect = np.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * draws[..., 1])
    # A crop has at least one pixel each way, which timm does not see to.
    width = np.maximum(np.rint(np.sqrt(area * aspect)), 1)
    height = np.maximum(np.rint(np.sqrt(area / aspect)), 1)
    fits: np.ndarray = np.logical_and(width <= w, height <= h)
    boxes = np.stack(
        [np.floor(draws[..., 2] * (h - height + 1)), np.floor(draws[..., 3] * (w - width + 1)), height, width], axis=-1
    )
    chosen = boxes[np.arange(len(boxes)), fits.argmax(axis=1)]
    return np.where(fits.any(axis=1, keepdims=True), chosen, _central(h, w, narrow, wide)).astype(np.int32)


def _central(h: int, w: int, narrow: float, wide: float) -> np.ndarray:
    """The largest central box of an allowed aspect ratio."""
    height, width = h, w
    if w / h < narrow:
        height = round(w / narrow)
    elif w / h > wide:
        width = round(h * wide)
    return np.array([(h - height) // 2, (w - width) // 2, height, width])
