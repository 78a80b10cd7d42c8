"""Crops on the device are Pillow's, up to its rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from qvit.training.crops import draw_crops
from qvit.training.resample import FILTERS, resampling_matrix, resized_crops
from qvit.training.sections import AugmentSection

PILLOW = {name: getattr(Image.Resampling, name.upper()) for name in FILTERS}


def smooth_images(count: int, channels: int, h: int, w: int) -> np.ndarray:
    """Images with structure, between dark and bright, so that no filter leaves the range of pixels."""
    rng = np.random.default_rng(0)
    small = rng.integers(40, 215, (count, channels, h // 4 + 2, w // 4 + 2)).astype(np.uint8)
    images = [
        np.stack([np.asarray(Image.fromarray(c).resize((w, h), Image.Resampling.BICUBIC)) for c in image]) for image in small
    ]
    return np.stack(images)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("shape", "size"),
    [((3, 64, 64), (64, 64)), ((3, 37, 53), (31, 29)), ((1, 37, 53), (64, 80)), ((3, 60, 23), (7, 16)), ((1, 8, 8), (8, 8))],
)
def test_the_crops_are_pillows(shape: tuple[int, int, int], size: tuple[int, int], interpolation: str) -> None:
    images = smooth_images(12, *shape)
    crops = draw_crops(0, 0, 0, 12, shape[1:], AugmentSection(scale=(0.08, 1.0)))
    assert set(crops.flips.tolist()) == {True, False}
    boxes, flips = torch.from_numpy(crops.boxes), torch.from_numpy(crops.flips)
    got = resized_crops(torch.from_numpy(images), boxes, flips, size, interpolation)
    assert (got.shape, got.dtype) == ((12, shape[0], *size), torch.float32)
    assert torch.equal(got, got.round())
    differences = []
    for image, (top, left, height, width), flip, result in zip(images, crops.boxes.tolist(), crops.flips, got, strict=True):
        picture = Image.fromarray(image[0] if shape[0] == 1 else image.transpose(1, 2, 0))
        picture = picture.crop((left, top, left + width, top + height)).resize(size[::-1], PILLOW[interpolation])
        if flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected = np.asarray(picture, dtype=np.float32)
        expected = expected[None] if shape[0] == 1 else expected.transpose(2, 0, 1)
        differences.append(np.abs(result.numpy() - expected))
    assert max(d.max() for d in differences) <= 1  # a half that is rounded the other way
    # Pillow may sum along the columns first where much is lost there; then more values between the passes round differently.
    assert np.mean([d.mean() for d in differences]) < (0.3 if shape[1] > 2 * size[0] else 0.02)


def test_a_whole_image_of_the_wanted_size_stays_as_it_is() -> None:
    images = torch.randint(0, 256, (2, 3, 9, 7), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 9, 7]] * 2)
    for interpolation in FILTERS:
        got = resized_crops(images, boxes, torch.tensor([False, True]), (9, 7), interpolation)
        assert torch.equal(got[0], images[0].float())
        assert torch.equal(got[1], images[1].flip(-1).float())


def test_values_beyond_black_and_white_are_cut() -> None:
    checker = (torch.arange(16)[:, None] // 4 + torch.arange(16)) // 4 % 2 * 255
    images = checker.to(torch.uint8).expand(1, 1, 16, 16)
    got = resized_crops(images, torch.tensor([[1, 1, 13, 13]]), torch.tensor([False]), (40, 40), "bicubic")
    assert got.min() == 0
    assert got.max() == 255


def test_weights_sum_to_one_and_read_nothing_outside() -> None:
    start, length = torch.tensor([0, 3, 19]), torch.tensor([20, 5, 1])
    for interpolation in FILTERS:
        matrix = resampling_matrix(start, length, 20, 11, interpolation)
        assert torch.allclose(matrix.sum(-1), torch.ones(3, 11), atol=1e-6)
        assert not matrix[1, :, :3].any()
        assert not matrix[1, :, 8:].any()
        assert torch.equal(matrix[2, :, 19], torch.ones(11))
        flipped = resampling_matrix(start, length, 20, 11, interpolation, torch.tensor([True, False, True]))
        assert torch.allclose(flipped[0], matrix[0].flip(0), atol=1e-6)
        assert torch.equal(flipped[1], matrix[1])
