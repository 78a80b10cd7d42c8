"""Running means that do not make a GPU wait, and where the time of an epoch went."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch


class LossWindow:
    """Means of the loss and its terms since they were last read; sums stay on the device until then."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sum: torch.Tensor | None = None
        self._steps = 0

    def add(self, total: torch.Tensor, terms: dict[str, torch.Tensor]) -> None:
        """Adds one step's loss and terms, scalars all."""
        self._names = ["loss", *terms]
        values = torch.stack([total.detach(), *terms.values()]).double()
        self._sum = values if self._sum is None else self._sum + values
        self._steps += 1

    def take(self) -> tuple[list[str], torch.Tensor] | None:
        """Names and means [terms] of the steps since the last call, float64 on the device; ``None`` if there were none."""
        if self._sum is None:
            return None
        means = self._sum / self._steps
        self._sum, self._steps = None, 0
        return self._names, means


class Stopwatch:
    """Time spent in training and, within it, in waiting for images.

    Attributes:
        images: that went by; seconds: spent; waited: of them, waiting for the loader.
    """

    def __init__(self) -> None:
        self.images, self.seconds, self.waited = 0, 0.0, 0.0

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, tuples that begin with the images."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            got = time.perf_counter()
            self.waited += got - asked
            if batch is None:
                return
            try:
                yield batch
            finally:
                self.images += len(batch[0])
                self.seconds += time.perf_counter() - asked

    def add(self, other: Stopwatch) -> None:
        """Adds what another one measured."""
        self.images += other.images
        self.seconds += other.seconds
        self.waited += other.waited

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def idle(self) -> float:
        """Share of the time spent waiting."""
        return self.waited / self.seconds if self.seconds else 0.0
