"""All images of a source as one tensor of pixels on a device, decoded once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from qvit.errors import RecipeError
from qvit.sources import ImageSource
from qvit.training.data import batches_of, ignore_interrupts

Decode = Callable[[Image.Image], np.ndarray]

_BATCH = 64  # images that a worker sends at once
_LARGEST_SHARE = 0.5  # of the free memory; the rest is for training


@dataclass(frozen=True)
class PixelStore:
    """Images and classes on a device.

    Attributes:
        pixels: uint8 [n, C, H, W].
        labels: int64 [n], class indices.
    """

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


class _Decoded(Dataset[tuple[np.ndarray, int]]):
    def __init__(self, source: ImageSource, decode: Decode, indices: Sequence[int]) -> None:
        self.source, self.decode, self.indices = source, decode, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        image, label = self.source[self.indices[position]]
        return self.decode(image), label


def _stack(batch: list[tuple[np.ndarray, int]]) -> tuple[torch.Tensor | None, torch.Tensor, list[tuple[int, ...]]]:
    """(pixels, ``None`` where they differ in size; labels; the sizes that occur)."""
    shapes = sorted({pixels.shape for pixels, _ in batch})
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in batch])) if len(shapes) == 1 else None
    return pixels, torch.tensor([label for _, label in batch]), shapes


def load_pixels(
    source: ImageSource,
    decode: Decode,
    device: torch.device,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    what: str = "training",
    progress: bool = False,
) -> PixelStore:
    """Decodes images in worker processes and keeps them on a device.

    Args:
        source: the images.
        decode: an image -> uint8 [C, H, W]; picklable, where there are workers.
        device: where to keep them.
        workers: processes that decode.
        indices: only these images, in this order; all by default.
        what: of the recipe's two sets they are, for messages.
        progress: show a bar on a terminal.

    Raises:
        InputError: an image cannot be read.
        RecipeError: the images differ in size, or would take more than half of the device's free memory.
    """
    indices = range(len(source)) if indices is None else indices
    if not len(indices):
        return PixelStore(
            torch.zeros(0, 1, 1, 1, dtype=torch.uint8, device=device), torch.zeros(0, dtype=torch.int64, device=device)
        )
    shape = decode(source[indices[0]][0]).shape
    check_memory(len(indices) * int(np.prod(shape)), free_memory(device), what)
    pixels = torch.empty(len(indices), *shape, dtype=torch.uint8, device=device)
    labels = torch.empty(len(indices), dtype=torch.int64, device=device)
    loader: DataLoader[Any] = DataLoader(
        _Decoded(source, decode, indices), _BATCH, num_workers=workers, collate_fn=_stack, worker_init_fn=ignore_interrupts
    )
    done = 0
    with _bar(progress) as bar:
        task = bar.add_task(f"reading {what} images", total=len(indices))
        for batch, classes, shapes in batches_of(loader):
            if other := [found for found in shapes if found != shape]:
                raise RecipeError(
                    f"The {what} images differ in size ({_size(shape)} and {_size(other[0])}), and data.cache=device keeps "
                    "them as they are stored: set data.cache_size to the side of a square to resize them to first."
                )
            pixels[done : done + len(classes)] = batch.to(device)
            labels[done : done + len(classes)] = classes.to(device)
            done += len(classes)
            bar.update(task, completed=done)
    return PixelStore(pixels, labels)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in main memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(needed: int, free: int, what: str) -> None:
    """Raises `RecipeError` where ``needed`` bytes are more than half of those that are ``free``."""
    if needed > _LARGEST_SHARE * free:
        raise RecipeError(
            f"The {what} images take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free, half of which training "
            "needs: lower data.cache_size, or remove data.cache to read images as they are needed."
        )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]} x {shape[1]}"


def _bar(shown: bool) -> Progress:
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))
