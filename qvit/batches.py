"""Batches of pixels, decoded on threads while the engine computes; without PyTorch.

Pillow lets go of Python's lock while it decodes and resizes, so threads are enough.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image

from qvit.errors import InputError
from qvit.preprocessing import Preprocessing
from qvit.sources import ImageSource

T = TypeVar("T")
U = TypeVar("U")


def map_ahead(function: Callable[[T], U], items: Iterable[T], workers: int, ahead: int) -> Iterator[U]:
    """``map(function, items)`` on threads: results in order, computed up to ``ahead`` items before they are taken.

    An error of ``function`` is raised where its result would have come. Nothing is left running when the iterator is closed.

    Args:
        function: of one item; called on several threads at once.
        items: taken from the caller's thread.
        workers: threads; 0 calls ``function`` when its result is asked for, on the caller's thread.
        ahead: results that may wait to be taken, which bounds memory.
    """
    if workers == 0:
        yield from map(function, items)
        return
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="qvit-images") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of ``size`` items; the last may be shorter."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class PixelBatches:
    """Batches (pixels uint8 [B, C, H, W], class indices int64 [B]) of a source in order, every image once.

    Each iteration starts anew. While a batch is computed, the next two are decoded.

    Args:
        source: the images.
        preprocessing: of the model.
        batch_size: images a batch; the last may be smaller.
        workers: threads that decode; 0 decodes on the caller's thread.
        indices: only these images, all by default.

    Raises:
        InputError: while iterating, an image cannot be read or prepared; the message names it.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocessing: Preprocessing,
        batch_size: int,
        workers: int = 0,
        indices: Sequence[int] | None = None,
    ) -> None:
        self.source, self.preprocessing, self.batch_size = source, preprocessing, batch_size
        self.workers = workers
        self.indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        samples = map_ahead(self._sample, self.indices, self.workers, ahead=2 * self.batch_size)
        for batch in in_batches(samples, self.batch_size):
            pixels, labels = zip(*batch, strict=True)
            yield np.stack(pixels), np.asarray(labels)

    def _sample(self, index: int) -> tuple[np.ndarray, int]:
        image, label = self.source[index]
        return prepare(self.preprocessing, image, f"Image {index}"), label


def prepare(preprocessing: Preprocessing, image: Image.Image, name: object) -> np.ndarray:
    """An image -> its pixels, uint8 [C, H, W]; raises `InputError`, with its name, where that fails."""
    try:
        return preprocessing.pixels(image)
    except InputError:
        raise
    except (OSError, ValueError, MemoryError) as error:
        raise InputError(f"{name} cannot be prepared for the model ({error}): use another image.") from None
