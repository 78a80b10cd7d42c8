"""Crop boxes are timm's, and depend on seed, epoch, image and repeat alone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.transforms
from PIL import Image

import qvit.training.crops
from qvit.training.crops import ATTEMPTS, crop_boxes, draw_crops
from qvit.training.sections import AugmentSection


def timms_box(draws: np.ndarray, size: tuple[int, int], augment: AugmentSection, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What timm makes of the same numbers in [0, 1), which it asks for one by one."""
    values = iter(draws.reshape(ATTEMPTS, 4))
    attempt: list[float] = []
    current: list[float] = []
    placed: list[int] = []

    def uniform(low: float, high: float) -> float:
        if len(attempt) in (0, 2):  # the area of the next attempt
            attempt[:] = []
            current[:] = next(values).tolist()
        attempt.append(current[len(attempt)])
        return low + (high - low) * attempt[-1]

    def randint(low: int, high: int) -> int:  # first for the top, then for the left
        position = 2 + len(placed)
        placed.append(position)
        return low + int(current[position] * (high - low + 1))

    monkeypatch.setattr(timm.data.transforms, "random", SimpleNamespace(uniform=uniform, randint=randint))
    image = Image.new("L", (size[1], size[0]))
    return list(timm.data.transforms.RandomResizedCropAndInterpolation.get_params(image, augment.scale, augment.ratio))


@pytest.mark.parametrize(
    ("size", "augment"),
    [
        ((224, 224), AugmentSection()),
        ((31, 57), AugmentSection()),
        ((300, 40), AugmentSection(scale=(0.35, 1.0))),  # many attempts do not fit
        ((40, 300), AugmentSection(scale=(0.9, 1.0), ratio=(0.9, 1.1))),  # none does: the central crop
        ((300, 40), AugmentSection(scale=(0.9, 1.0), ratio=(0.9, 1.1))),
        ((50, 50), AugmentSection(scale=(1, 1), ratio=(1, 1))),
        ((32, 32), AugmentSection(scale=(1, 1), ratio=(0.5, 0.6))),
    ],
)
def test_the_boxes_are_timms(size: tuple[int, int], augment: AugmentSection, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(0).random((60, 4 * ATTEMPTS))
    boxes = crop_boxes(draws, size, augment)
    assert boxes.dtype == np.int32
    assert boxes.tolist() == [timms_box(row, size, augment, monkeypatch) for row in draws]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= size[0]).all()
    assert (boxes[:, 1] + boxes[:, 3] <= size[1]).all()


def test_a_crop_of_a_tiny_image_has_a_pixel() -> None:
    boxes = crop_boxes(np.random.default_rng(0).random((50, 4 * ATTEMPTS)), (2, 2), AugmentSection(scale=(0.01, 0.02)))
    assert (boxes[:, 2:] >= 1).all()


def test_choices_depend_on_seed_epoch_image_and_repeat_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    augment = AugmentSection()
    crops = draw_crops(3, 5, 1, 100, (40, 60), augment)
    np.random.seed(7)
    again = draw_crops(3, 5, 1, 37, (40, 60), augment)
    assert np.array_equal(again.boxes, crops.boxes[:37])
    assert np.array_equal(again.flips, crops.flips[:37])
    monkeypatch.setattr(qvit.training.crops, "_CHUNK", 7)
    chunked = draw_crops(3, 5, 1, 100, (40, 60), augment)
    assert np.array_equal(chunked.boxes, crops.boxes)
    assert np.array_equal(chunked.flips, crops.flips)
    for other in ((4, 5, 1), (3, 6, 1), (3, 5, 0)):
        assert (draw_crops(*other, 100, (40, 60), augment).boxes != crops.boxes).any(axis=1).mean() > 0.9
    assert len(np.unique(crops.boxes, axis=0)) > 90


def test_flips_have_their_probability() -> None:
    rates = {p: draw_crops(0, 0, 0, 4000, (8, 8), AugmentSection(hflip=p)).flips.mean() for p in (0.0, 0.25, 0.5, 1.0)}
    assert rates[0.0] == 0
    assert rates[1.0] == 1
    assert rates[0.25] == pytest.approx(0.25, abs=0.03)
    assert rates[0.5] == pytest.approx(0.5, abs=0.03)


def test_areas_and_places_are_spread_as_asked() -> None:
    boxes = draw_crops(0, 0, 0, 4000, (100, 100), AugmentSection(scale=(0.2, 0.6), ratio=(0.8, 1.25))).boxes
    area = boxes[:, 2] * boxes[:, 3] / 1e4
    assert area.min() == pytest.approx(0.2, abs=0.02)
    assert area.max() == pytest.approx(0.6, abs=0.02)
    assert area.mean() == pytest.approx(0.4, abs=0.01)
    place = boxes[:, 0] / np.maximum(100 - boxes[:, 2], 1)
    assert place.mean() == pytest.approx(0.5, abs=0.03)
