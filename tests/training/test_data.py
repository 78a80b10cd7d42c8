"""Batches: their randomness depends on seed, epoch and image alone; evaluation is the deployed preprocessing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from qvit.errors import InputError, RecipeError
from qvit.preprocessing import Preprocessing
from qvit.sources import open_source
from qvit.training.data import (
    BatchMixer,
    EpochSampler,
    EvaluationSet,
    SampleKey,
    TrainingSet,
    batches_of,
    check_classes,
    evaluation_loader,
    loader_options,
    open_split,
    training_transform,
)
from qvit.training.recipe import Recipe
from qvit.training.sections import AugmentSection, DataSection

from .helpers import TRAIN, VAL

RGB = Preprocessing((3, 8, 8))
STRONG = DataSection(augment=AugmentSection(auto_augment="rand-m9-mstd0.5-inc1", erase=0.5, interpolation="random"))


def training_set(folder: Path, seed: int = 0) -> TrainingSet:
    return TrainingSet(open_source(folder, "train"), training_transform(STRONG, RGB), "RGB", seed)


def test_a_sample_depends_on_its_key_alone(image_folder: Path) -> None:
    data = training_set(image_folder)
    key = SampleKey(7, 3, 1)
    first, label = data[key]
    torch.rand(5)
    np.random.rand(5)
    data[SampleKey(8, 3, 1)]
    again, _ = data[key]
    assert torch.equal(first, again)
    assert first.shape == (3, 8, 8)
    assert label == data.source[7][1]
    # Strong augmentation of noise never repeats by chance.
    for other in (SampleKey(7, 4, 1), SampleKey(7, 3, 0)):
        assert not torch.equal(first, data[other][0])
    assert not torch.equal(first, training_set(image_folder, seed=1)[key][0])


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_loader_processes(image_folder: Path, workers: int) -> None:
    def batches(workers: int) -> list[torch.Tensor]:
        sampler = EpochSampler(TRAIN, 8, seed=0)
        sampler.start(2)
        options = loader_options(workers, torch.device("cpu"))
        return [images for images, _ in DataLoader(training_set(image_folder), 8, sampler=sampler, drop_last=True, **options)]

    alone = batches(0)
    assert len(alone) == 5
    assert all(torch.equal(a, b) for a, b in zip(alone, batches(workers), strict=True))


def test_an_epoch_is_a_permutation_cut_to_whole_steps() -> None:
    sampler = EpochSampler(images=43, step_size=10, seed=5)
    first = list(sampler)
    assert len(first) == len(sampler) == 40
    assert len({key.image for key in first}) == 40
    assert {key.repeat for key in first} == {0}
    assert list(sampler) == first
    sampler.start(epoch=1)
    second = list(sampler)
    assert [key.image for key in second] != [key.image for key in first]
    assert {key.epoch for key in second} == {1}
    sampler.start(epoch=0, step=3)
    assert list(sampler) == first[30:]
    assert list(EpochSampler(43, 10, seed=6)) != first


def test_repeated_augmentation_draws_an_image_several_times_in_a_row() -> None:
    keys = list(EpochSampler(images=30, step_size=6, seed=0, repeats=3))
    assert len(keys) == 30
    for start in range(0, 30, 3):
        group = keys[start : start + 3]
        assert len({key.image for key in group}) == 1
        assert [key.repeat for key in group] == [0, 1, 2]
    assert len({key.image for key in keys}) == 10


def test_evaluation_is_the_deployed_preprocessing(image_folder: Path) -> None:
    preprocessing = Preprocessing((3, 6, 6), crop_pct=0.8, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    source = open_source(image_folder, "val")
    batches = list(evaluation_loader(source, preprocessing, batch_size=4))
    assert [len(labels) for _, labels in batches] == [4, 4, 3]
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.float32
    for index in range(VAL):
        expected = preprocessing.normalise(preprocessing.pixels(source[index][0]))
        assert np.array_equal(images[index].numpy(), expected)
    assert torch.cat([labels for _, labels in batches]).tolist() == source.labels.tolist()


def test_shares_of_the_evaluation_cover_every_image_once(image_folder: Path) -> None:
    source = open_source(image_folder, "val")
    whole = EvaluationSet(source, RGB)
    shares = [EvaluationSet(source, RGB, range(rank, len(source), 3)) for rank in range(3)]
    assert sum(map(len, shares)) == len(whole) == VAL
    assert torch.equal(shares[1][2][0], whole[7][0])


def test_training_without_augmentation_is_what_evaluation_sees(image_folder: Path) -> None:
    still = DataSection(augment=AugmentSection(scale=(1, 1), ratio=(1, 1), hflip=0))
    source = open_source(image_folder, "train")
    preprocessing = Preprocessing((3, 8, 8), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    train = TrainingSet(source, training_transform(still, preprocessing), "RGB", 0)
    assert torch.allclose(train[SampleKey(3, 0, 0)][0], EvaluationSet(source, preprocessing)[3][0], atol=1e-6)


def test_greyscale_digits() -> None:
    recipe = Recipe.load("digits")
    preprocessing = Preprocessing((1, 8, 8), mean=(0.3,), std=(0.4,))
    source = open_split(recipe.data, "train")
    images, _ = TrainingSet(source, training_transform(recipe.data, preprocessing), "L", 0)[SampleKey(0, 0, 0)]
    assert images.shape == (1, 8, 8)
    with pytest.raises(RecipeError, match="greyscale"):
        training_transform(STRONG, preprocessing)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(RecipeError, match="nonsense"):
        training_transform(DataSection(augment=AugmentSection(auto_augment="nonsense")), RGB)


def test_classes_must_be_as_many_as_the_models(image_folder: Path) -> None:
    with pytest.raises(InputError, match="training images have 3 classes and the model has 1000"):
        check_classes(open_source(image_folder, "train"), 1000, "training")


def test_a_recipe_without_images() -> None:
    with pytest.raises(RecipeError, match=r"data\.train"):
        open_split(DataSection(), "val")


def test_an_error_in_a_loader_process_stays_one_sentence(image_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "red"
    folder.mkdir(parents=True)
    (folder / "broken.png").write_bytes(b"no image")
    loader = evaluation_loader(open_source(tmp_path / "set", "val"), RGB, 2, workers=1)
    with pytest.raises(InputError, match=r"^\S*broken\.png cannot be read as an image") as caught:
        list(batches_of(loader))
    assert "\n" not in str(caught.value)


def test_labels_are_smoothed() -> None:
    mixer = BatchMixer(DataSection(label_smoothing=0.1), num_classes=5)
    images = torch.rand(4, 3, 8, 8)
    same, targets = mixer(images, torch.tensor([0, 1, 4, 4]))
    assert torch.equal(same, images)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert torch.allclose(targets[2], torch.tensor([0.02, 0.02, 0.02, 0.02, 0.92]))
    plain, labels = BatchMixer(DataSection(), 5)(images, torch.tensor([0, 1, 4, 4]))
    assert plain is images
    assert labels.dtype == torch.int64


def test_mixup_mixes_images_and_labels() -> None:
    mixer = BatchMixer(DataSection(mixup=0.8, cutmix=1.0, label_smoothing=0.1), num_classes=3)
    np.random.seed(0)
    images = torch.rand(4, 3, 8, 8)
    mixed, targets = mixer(images.clone(), torch.tensor([0, 1, 2, 0]))
    assert not torch.equal(mixed, images)
    assert targets.shape == (4, 3)
    assert torch.allclose(targets.sum(1), torch.ones(4))
