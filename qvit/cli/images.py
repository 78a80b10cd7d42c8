"""Images for evaluation, as the commands name them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qvit.batches import PixelBatches
from qvit.errors import InputError
from qvit.preprocessing import Preprocessing
from qvit.report_file import usable_cores
from qvit.sources import ImageSource, open_source

if TYPE_CHECKING:
    import torch


def location_of(data: Sequence[str]) -> str | list[str]:
    """What ``--data`` said, as `qvit.sources.open_source` takes it."""
    return data[0] if len(data) == 1 else list(data)


def name_of(data: Sequence[str]) -> str:
    """What ``--data`` said, for tables and result files: names without their folders."""
    return ", ".join(Path(path).name or str(path) for path in data)


def open_evaluation(
    data: Sequence[str],
    classes: Sequence[str],
    preprocessing: Preprocessing,
    batch: int,
    limit: int | None,
    workers: int | None,
) -> tuple[ImageSource, PixelBatches]:
    """The validation images of ``--data``, also as batches of pixels.

    Args:
        data: locations.
        classes: the model's; there must be as many class folders, and they are matched in sorted order.
        preprocessing: of the model.
        batch: images a batch.
        limit: use this many, evenly spaced; all by default.
        workers: threads that read images; one a core by default.

    Raises:
        InputError: there are no such images, another number of classes, or a number is out of range.
    """
    at_least_one("--batch", batch)
    source = open_source(location_of(data), "val")
    if len(source.classes) != len(classes):
        raise InputError(
            f"{name_of(data)} has {len(source.classes)} classes and the model has {len(classes)}: "
            "use images of the model's classes."
        )
    indices = None if limit is None else spaced(len(source), at_least_one("--limit", limit))
    return source, PixelBatches(source, preprocessing, batch, workers_of(workers), indices)


def as_tensors(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], preprocessing: Preprocessing
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of pixels as PyTorch models take them: (normalised float32 images [B, C, H, W], class indices [B])."""
    import torch

    for pixels, labels in batches:
        yield torch.from_numpy(preprocessing.normalise(pixels)), torch.from_numpy(labels)


def spaced(total: int, limit: int) -> list[int]:
    """``limit`` indices evenly spaced over ``total`` images, which are sorted by class; all if there are fewer."""
    return np.linspace(0, total - 1, min(limit, total)).round().astype(int).tolist()


def at_least_one(option: str, value: int) -> int:
    """The value of an option that counts something.

    Raises:
        InputError: it is less than one.
    """
    if value < 1:
        raise InputError(f"{option} {value} is out of range: use 1 or more.")
    return value


def workers_of(workers: int | None) -> int:
    """Threads that read images, as ``--workers`` says, by default one a core.

    Raises:
        InputError: it is less than zero.
    """
    if workers is None:
        return usable_cores()
    if workers < 0:
        raise InputError(f"--workers {workers} is out of range: use 0 or more.")
    return workers


def device_of(device: str | None) -> str:
    """The device that ``--device`` names, by default a GPU where there is one; a numbered GPU becomes PyTorch's current one.

    Raises:
        InputError: PyTorch has no such device here.
    """
    import torch

    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"There is no device {device!r} here: use cpu, or cuda where there is a GPU.") from None
    where = torch.device(device)
    if where.type == "cuda" and where.index is not None:
        torch.cuda.set_device(where)  # Triton's kernels and a step's timing go to the current one, wherever tensors are
    return device
