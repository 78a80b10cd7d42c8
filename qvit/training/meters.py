"""Running means that do not make a GPU wait, and where the time of an epoch went."""

from __future__ import annotations

import time
from collections import deque
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
    """Time spent in training and, within it, in getting images.

    On a GPU, launches run ahead of the work: a host that asks for a batch is then often held up by a full queue of launches
    while the GPU computes. So what counts there is the GPU's own time between the end of a step and the batch being there: for
    images that come from the host, how long it had nothing to do; for images that it keeps itself, how long it crops them.

    Args:
        device: that trains.

    Attributes:
        images: that went by; seconds: spent; waited: of them, in getting images.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.images, self.seconds = 0, 0.0
        self._on_gpu = torch.device(device).type == "cuda"
        self._waited = 0.0
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, tuples that begin with the images."""
        iterator = iter(batches)
        while True:
            asked, start = time.perf_counter(), self._mark()
            batch = next(iterator, None)
            self._count(start, asked)
            if batch is None:
                return
            try:
                yield batch
            finally:
                self.images += len(batch[0])
                self.seconds += time.perf_counter() - asked

    def _mark(self) -> torch.cuda.Event | None:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _count(self, start: torch.cuda.Event | None, asked: float) -> None:
        end = self._mark()
        if start is None or end is None:
            self._waited += time.perf_counter() - asked
            return
        self._spans.append((start, end))
        while self._spans[0][1].query() and len(self._spans) > 1:  # what has passed by now, without waiting
            self._take_span()

    def _take_span(self) -> None:
        start, end = self._spans.popleft()
        self._waited += start.elapsed_time(end) / 1e3

    @property
    def waited(self) -> float:
        """Seconds spent in getting images; on a GPU, reading it waits for the last batch."""
        while self._spans:
            self._spans[0][1].synchronize()
            self._take_span()
        return self._waited

    def add(self, other: Stopwatch) -> None:
        """Adds what another one measured."""
        self.images += other.images
        self.seconds += other.seconds
        self._waited += other.waited

    @property
    def rate(self) -> float:
        """Images a second."""
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def idle(self) -> float:
        """Share of the time spent in getting images."""
        return min(self.waited / self.seconds, 1.0) if self.seconds else 0.0
