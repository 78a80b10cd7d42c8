"""Batches from the device: the loader's images, timm's crops, any share of any epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qvit.preprocessing import Preprocessing
from qvit.sources import open_source
from qvit.training.crops import draw_crops
from qvit.training.data import EpochSampler, evaluation_loader
from qvit.training.device_data import AsStored, DeviceEvaluationLoader, DeviceLoader, Normaliser
from qvit.training.pixels import PixelStore, load_pixels
from qvit.training.sections import AugmentSection, DataSection

from .helpers import TRAIN

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing((3, 6, 10), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


@pytest.fixture(scope="module")
def store(image_folder: Path) -> PixelStore:
    return load_pixels(open_source(image_folder, "train"), AsStored(3), CPU)


def loader(
    store: PixelStore,
    sampler: EpochSampler,
    augment: AugmentSection | None = None,
    batch_size: int = 8,
    seed: int = 0,
    process: int = 0,
    processes: int = 1,
) -> DeviceLoader:
    data = DataSection(cache="device", augment=augment or AugmentSection())
    return DeviceLoader(store, sampler, data, PREPROCESSING, batch_size, seed, process, processes)


def test_a_batch_is_what_pillow_makes_of_the_same_boxes(store: PixelStore, image_folder: Path) -> None:
    source = open_source(image_folder, "train")
    sampler = EpochSampler(TRAIN, 8, seed=3)
    sampler.start(2)
    augment = AugmentSection(scale=(0.3, 1.0), interpolation="bilinear")  # does not leave the range of pixels on noise
    crops = draw_crops(5, 2, 0, TRAIN, (8, 8), augment)
    keys = list(sampler)
    differences = []
    for step, (images, labels) in enumerate(loader(store, sampler, augment, seed=5)):
        assert (images.shape, images.dtype, images.is_contiguous()) == ((8, 3, 6, 10), torch.float32, True)
        for key, image, label in zip(keys[step * 8 :], images, labels, strict=False):
            picture, expected_label = source[key.image]
            top, left, height, width = crops.boxes[key.image].tolist()
            picture = picture.crop((left, top, left + width, top + height)).resize((10, 6), Image.Resampling.BILINEAR)
            if crops.flips[key.image]:
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            expected = PREPROCESSING.normalise(np.asarray(picture).transpose(2, 0, 1))
            levels = (image.numpy() - expected) * np.float32(255) * np.array(PREPROCESSING.std, np.float32)[:, None, None]
            differences.append(np.abs(levels).max())
            assert label == expected_label
    assert len(differences) == TRAIN
    assert max(differences) < 1.01  # a half that is rounded the other way


def test_without_augmentation_a_batch_is_what_evaluation_sees(image_folder: Path, store: PixelStore) -> None:
    preprocessing = Preprocessing((3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    still = DataSection(cache="device", augment=AugmentSection(scale=(1, 1), ratio=(1, 1), hflip=0))
    sampler = EpochSampler(TRAIN, 8, seed=0)
    source = open_source(image_folder, "train")
    images, labels = next(iter(DeviceLoader(store, sampler, still, preprocessing, 8, seed=0)))
    for key, image, label in zip(sampler, images, labels, strict=False):
        assert np.array_equal(image.numpy(), preprocessing.normalise(preprocessing.pixels(source[key.image][0])))
        assert label == source[key.image][1]


def test_processes_share_what_one_process_gets(store: PixelStore) -> None:
    sampler = EpochSampler(TRAIN, 12, seed=1)
    whole = list(loader(store, sampler, batch_size=12))
    shares = [list(loader(store, sampler, batch_size=4, process=rank, processes=3)) for rank in range(3)]
    assert len(whole) == len(shares[0]) == 3
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(images, torch.cat([share[step][0] for share in shares]))
        assert torch.equal(labels, torch.cat([share[step][1] for share in shares]))


def test_an_epoch_can_be_resumed_within(store: PixelStore) -> None:
    sampler = EpochSampler(TRAIN, 8, seed=1)
    sampler.start(1)
    whole = list(loader(store, sampler))
    sampler.start(1, 3)
    rest = list(loader(store, sampler))
    assert len(whole) == 5
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(whole[3:], rest, strict=True))
    sampler.start(2)
    assert not torch.equal(next(iter(loader(store, sampler)))[0], whole[0][0])


def test_repeats_are_cropped_each_in_its_own_way(store: PixelStore) -> None:
    sampler = EpochSampler(TRAIN, 6, seed=0, repeats=3)
    images, labels = next(iter(loader(store, sampler, AugmentSection(scale=(0.2, 0.5)), batch_size=6)))
    assert len(set(labels[:3].tolist())) == 1
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])


def test_evaluation_has_the_bits_of_the_deployed_preprocessing(image_folder: Path) -> None:
    source = open_source(image_folder, "val")
    preprocessing = Preprocessing((3, 7, 5), crop_pct=0.8, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    cached = DeviceEvaluationLoader(load_pixels(source, preprocessing.pixels, CPU), preprocessing, 4)
    expected = list(evaluation_loader(source, preprocessing, 4))
    for _ in range(2):
        got = list(cached)
        assert [len(labels) for _, labels in got] == [4, 4, 3]
        for (images, labels), (wanted, wanted_labels) in zip(got, expected, strict=True):
            assert torch.equal(images, wanted)
            assert torch.equal(labels, wanted_labels)


def test_normalising_is_numpys_bit_for_bit() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
    assert np.array_equal(Normaliser(PREPROCESSING, CPU)(torch.from_numpy(pixels)).numpy(), PREPROCESSING.normalise(pixels))


def test_greyscale_and_palette_images_are_converted() -> None:
    picture = Image.new("P", (3, 2), 5)
    assert AsStored(3)(picture).shape == (3, 2, 3)
    assert AsStored(1)(picture).shape == (1, 2, 3)
