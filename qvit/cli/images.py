"""Images for evaluation, as the commands name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvit.errors import InputError
from qvit.preprocessing import Preprocessing

if TYPE_CHECKING:
    import torch

    from qvit.sources import ImageSource


def location_of(data: Sequence[str]) -> str | list[str]:
    """What ``--data`` said, as `qvit.sources.open_source` takes it."""
    return data[0] if len(data) == 1 else list(data)


def name_of(data: Sequence[str]) -> str:
    """What ``--data`` said, for tables and result files: names without their folders."""
    return ", ".join(Path(path).name or str(path) for path in data)


def open_evaluation(
    data: Sequence[str], classes: Sequence[str], preprocessing: Preprocessing, batch: int, limit: int | None, workers: int
) -> tuple[ImageSource, torch.utils.data.DataLoader[Any]]:
    """The validation images of ``--data`` and a loader of batches (images [B, C, H, W], class indices [B]).

    Args:
        data: locations.
        classes: the model's; there must be as many class folders, and they are matched in sorted order.
        preprocessing: of the model.
        batch: images a batch.
        limit: use this many, evenly spaced; all by default.
        workers: processes that read images.

    Raises:
        InputError: there are no such images, another number of classes, or a number is out of range.
    """
    from qvit.sources import open_source
    from qvit.training.data import evaluation_loader

    at_least_one("--batch", batch)
    source = open_source(location_of(data), "val")
    if len(source.classes) != len(classes):
        raise InputError(
            f"{name_of(data)} has {len(source.classes)} classes and the model has {len(classes)}: "
            "use images of the model's classes."
        )
    indices = None if limit is None else spaced(len(source), at_least_one("--limit", limit))
    if workers < 0:
        raise InputError(f"--workers {workers} is out of range: use 0 or more.")
    return source, evaluation_loader(source, preprocessing, batch, workers, indices)


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


def device_of(device: str | None) -> str:
    """The device that ``--device`` names, by default a GPU where there is one.

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
    return device
