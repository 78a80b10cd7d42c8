"""The batches of a run, read by worker processes or kept on the training device, as ``data.cache`` says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from qvit.preprocessing import Preprocessing
from qvit.training.data import EpochSampler, TrainingSet, evaluation_loader, loader_options, training_transform
from qvit.training.device_data import AsStored, DeviceEvaluationLoader, DeviceLoader
from qvit.training.pixels import Decode, load_pixels
from qvit.training.recipe import Recipe
from qvit.training.setup import Setup

Batches = Iterable[Any]


def build_loaders(
    recipe: Recipe, setup: Setup, accelerator: Accelerator, sampler: EpochSampler, progress: bool = False
) -> tuple[Batches, Batches]:
    """Training batches in the sampler's order, and batches of this process's share of the validation images.

    Both give (images [B, C, H, W] float32, class indices [B]); each time that it is iterated, the first goes on where the
    sampler stands, and the second starts again.

    Args:
        recipe: of the run.
        setup: its images and preprocessing.
        accelerator: of the run.
        sampler: of the order.
        progress: show a bar on a terminal while images are decoded into the cache.

    Raises:
        RecipeError: the augmentation cannot be made, or the images cannot be kept on the device.
        InputError: an image cannot be read into the cache.
    """
    # Every process evaluates a share of its own, so no image is padded in or counted twice.
    mine = range(accelerator.process_index, len(setup.val), accelerator.num_processes)
    if recipe.data.cache == "device":
        return _on_device(recipe, setup, accelerator, sampler, mine, progress)
    data, preprocessing = recipe.data, setup.preprocessing
    mode = "L" if preprocessing.input_size[0] == 1 else "RGB"
    train = TrainingSet(setup.train, training_transform(data, preprocessing), mode, recipe.seed)
    options = loader_options(data.workers, accelerator.device)
    loader: Any = DataLoader(train, batch_size=recipe.batch_size, sampler=sampler, drop_last=True, **options)
    val = evaluation_loader(setup.val, preprocessing, recipe.batch_size, data.workers, mine, accelerator.device)
    return accelerator.prepare(loader), val


def _on_device(
    recipe: Recipe, setup: Setup, accelerator: Accelerator, sampler: EpochSampler, mine: range, progress: bool
) -> tuple[Batches, Batches]:
    data, preprocessing, device = recipe.data, setup.preprocessing, accelerator.device
    show = progress and accelerator.is_main_process
    train = load_pixels(setup.train, stored_form(recipe, preprocessing), device, data.workers, what="training", progress=show)
    loader = DeviceLoader(
        train,
        sampler,
        data,
        preprocessing,
        recipe.batch_size,
        recipe.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    val = load_pixels(setup.val, preprocessing.pixels, device, data.workers, mine, "validation", show)
    return loader, DeviceEvaluationLoader(val, preprocessing, recipe.batch_size)


def stored_form(recipe: Recipe, preprocessing: Preprocessing) -> Decode:
    """How training images are kept: as they are, or resized and cropped to a square of ``data.cache_size``."""
    channels = preprocessing.input_size[0]
    side = recipe.data.cache_size
    if side is None:
        return AsStored(channels)
    unit = (0.0,) * channels, (1.0,) * channels
    return Preprocessing((channels, side, side), crop_pct=1.0, interpolation="bicubic", mean=unit[0], std=unit[1]).pixels
