"""From a source of images to batches: augmentation, order, loaders, mixing.

Every random choice about an image depends on the seed, the epoch and the image alone, and the order of an epoch on the seed
and the epoch. So batches do not depend on the number of loader or training processes, nor on where a run was resumed.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from qvit.errors import InputError, RecipeError
from qvit.preprocessing import Preprocessing
from qvit.sources import ImageSource, open_source
from qvit.training.sections import DataSection
from qvit.training.seeding import derive_seed, seed_sample


class SampleKey(NamedTuple):
    """Which image to load, and for which of its appearances.

    Attributes:
        image: its index in its source.
        epoch: whose augmentation it has.
        repeat: number of its appearance within the epoch (repeated augmentation).
    """

    image: int
    epoch: int
    repeat: int


class EpochSampler(Sampler[SampleKey]):
    """The order of the images in an epoch, cut to whole steps.

    With ``repeats`` > 1, an image appears that many times in a row and an epoch sees accordingly fewer images (repeated
    augmentation, Hoffer et al. 2020, as in DeiT): its length stays.

    Args:
        images: number of images in the source.
        step_size: images a step, over all processes.
        seed: of the order.
        repeats: appearances of an image.
        crops: after so many epochs the images' augmentation starts again; 0 for never. The order stays another one each epoch.

    Attributes:
        epoch: that the next iteration yields.
    """

    def __init__(self, images: int, step_size: int, seed: int, repeats: int = 1, crops: int = 0) -> None:
        self.images, self.step_size, self.seed, self.repeats, self.crops = images, step_size, seed, repeats, crops
        self.steps = images // step_size
        self.epoch, self._first_step = 0, 0

    def start(self, epoch: int, step: int = 0) -> None:
        """Sets what the next iteration yields: the given epoch from the given step on."""
        self.epoch, self._first_step = epoch, step

    @property
    def crop_epoch(self) -> int:
        """The epoch whose augmentation the images have."""
        return self.epoch % self.crops if self.crops else self.epoch

    def __len__(self) -> int:
        return self.steps * self.step_size

    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """What the next iteration yields, as arrays: images and repeats, int64 [n], of the rest of ``epoch``."""
        order = np.random.default_rng(derive_seed(self.seed, self.epoch)).permutation(self.images)
        images, repeats = np.divmod(np.arange(self._first_step * self.step_size, len(self)), self.repeats)
        return order[images], repeats

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.crop_epoch
        for image, repeat in zip(*self.positions(), strict=True):
            yield SampleKey(int(image), epoch, int(repeat))


class TrainingSet(Dataset[tuple[torch.Tensor, int]]):
    """Augmented images of a source, by `SampleKey`: float32 [C, H, W], normalised, and the class index."""

    def __init__(self, source: ImageSource, transform: Callable[[Image.Image], torch.Tensor], mode: str, seed: int) -> None:
        self.source, self.transform, self.mode, self.seed = source, transform, mode, seed

    def __getitem__(self, key: SampleKey) -> tuple[torch.Tensor, int]:
        image, label = self.source[key.image]
        seed_sample(self.seed, key.epoch, key.image, key.repeat)
        return self.transform(image.convert(self.mode)), label


class EvaluationSet(Dataset[tuple[torch.Tensor, int]]):
    """Images of a source as the deployed model sees them: float32 [C, H, W], normalised, and the class index."""

    def __init__(self, source: ImageSource, preprocessing: Preprocessing, indices: Sequence[int] | None = None) -> None:
        self.source, self.preprocessing = source, preprocessing
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        image, label = self.source[self.indices[position]]
        return torch.from_numpy(self.preprocessing.normalise(self.preprocessing.pixels(image))), label


def training_transform(data: DataSection, preprocessing: Preprocessing) -> Callable[[Image.Image], torch.Tensor]:
    """timm's training transform, normalised as the model expects.

    Raises:
        RecipeError: an augmentation that the model's images cannot have, or a policy that timm does not know.
    """
    augment = data.augment
    if augment.auto_augment and preprocessing.input_size[0] != 3:
        raise RecipeError("data.augment.auto_augment needs colour images: remove it for a greyscale model.")
    try:
        return create_transform(
            input_size=preprocessing.input_size,
            is_training=True,
            scale=augment.scale,
            ratio=augment.ratio,
            hflip=augment.hflip,
            color_jitter=augment.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=augment.auto_augment,
            interpolation=augment.interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            re_prob=augment.erase,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise RecipeError(f"timm knows no policy {augment.auto_augment!r} for data.augment.auto_augment ({error}).") from None


def open_split(data: DataSection, split: str) -> ImageSource:
    """The training or validation images of a recipe.

    Raises:
        RecipeError: the recipe names none.
        InputError: they cannot be opened.
    """
    location = data.train if split == "train" else data.val or data.train
    if location is None:
        raise RecipeError("The recipe names no images: set data.train (a folder, a tar file or digits).")
    return open_source(location, "train" if split == "train" else "val")


def check_classes(source: ImageSource, num_classes: int, what: str) -> None:
    """Raises `InputError` if the number of classes of the ``what`` images differs from the model's."""
    if len(source.classes) != num_classes:
        raise InputError(
            f"The {what} images have {len(source.classes)} classes and the model has {num_classes}: "
            "set model.args.num_classes, or use other images."
        )


def loader_options(workers: int, device: torch.device) -> dict[str, Any]:
    """Keyword arguments that every `DataLoader` here shares."""
    return {
        "num_workers": workers,
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
        "worker_init_fn": ignore_interrupts,
    }


def ignore_interrupts(_worker: int) -> None:
    """Lets Ctrl-C, which reaches loader processes too, be answered by the training process alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def evaluation_loader(
    source: ImageSource,
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> DataLoader[Any]:
    """Batches (images [B, C, H, W], class indices [B]) of a source in order, every image once; the last may be smaller.

    Args:
        source: the images.
        preprocessing: of the model.
        batch_size: images a batch.
        workers: loader processes.
        indices: only these images, all by default. Pass ``range(rank, len(source), processes)`` for one process's share.
        device: where the batches will go.
    """
    options = loader_options(workers, torch.device(device))
    return DataLoader(EvaluationSet(source, preprocessing, indices), batch_size=batch_size, **options)


def batches_of(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches; an `InputError` from a loader process arrives as the sentence that it is, without traceback."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).rstrip().rpartition("InputError: ")[2]) from None


class BatchMixer:
    """Mixup, cutmix and label smoothing of a batch on its device.

    Args:
        data: the recipe's section.
        num_classes: of the model.
    """

    def __init__(self, data: DataSection, num_classes: int) -> None:
        self.smoothing, self.num_classes = data.label_smoothing, num_classes
        self.mixup = None
        if data.mixup > 0 or data.cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=data.mixup, cutmix_alpha=data.cutmix, label_smoothing=data.label_smoothing, num_classes=num_classes
            )

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """images [B, C, H, W], labels [B] -> images and labels [B], or probabilities [B, classes] if mixed or smoothed."""
        if self.mixup is not None:
            return self.mixup(images, labels)
        if self.smoothing:
            return images, F.one_hot(labels, self.num_classes) * (1 - self.smoothing) + self.smoothing / self.num_classes
        return images, labels
