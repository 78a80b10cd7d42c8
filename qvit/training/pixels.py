"""All images of a source as one tensor of pixels on a device, decoded once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qvit.errors import RecipeError
from qvit.sources import ImageSource

Decode = Callable[[Image.Image], np.ndarray]

_BATCH = 512  # images that are decoded before they go to the device
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


def load_pixels(
    source: ImageSource,
    decode: Decode,
    device: torch.device,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    what: str = "training",
    progress: bool = False,
) -> PixelStore:
    """Decodes images on threads and keeps them on a device.

    Threads, since Pillow holds no lock while it decodes and resizes, and since a process that uses a GPU takes seconds to fork
    on some systems.

    Args:
        source: the images.
        decode: an image -> uint8 [C, H, W].
        device: where to keep them.
        workers: threads that decode; at least one does.
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

    def read(index: int) -> tuple[np.ndarray, int]:
        image, label = source[index]
        return decode(image), label

    with ThreadPoolExecutor(max(workers, 1)) as threads, _bar(progress) as bar:
        task = bar.add_task(f"reading {what} images", total=len(indices))
        try:
            for start in range(0, len(indices), _BATCH):
                read_images = list(threads.map(read, indices[start : start + _BATCH]))
                if other := next((image.shape for image, _ in read_images if image.shape != shape), None):
                    raise RecipeError(
                        f"The {what} images differ in size ({_size(shape)} and {_size(other)}), and data.cache=device keeps "
                        "them as they are stored: set data.cache_size to the side of a square to resize them to first."
                    )
                stop = start + len(read_images)
                pixels[start:stop] = torch.from_numpy(np.stack([image for image, _ in read_images])).to(device)
                labels[start:stop] = torch.tensor([label for _, label in read_images]).to(device)
                bar.update(task, completed=stop)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
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
