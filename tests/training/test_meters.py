"""The stopwatch: host time on a CPU, the GPU's own time on a GPU, read without holding up a step."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from qvit.training.meters import Stopwatch

Batch = tuple[torch.Tensor, torch.Tensor]


def batches(count: int, seconds: float = 0.0) -> Iterator[Batch]:
    for _ in range(count):
        time.sleep(seconds)
        yield torch.zeros(4, 1), torch.zeros(4)


class Queue:
    """A GPU that reaches an event only once it was waited for, each 2 ms after the one before."""

    reached = recorded = 0

    def event(self, enable_timing: bool = False) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def record(self) -> None:
        self.queue.recorded += 1
        self.number = self.queue.recorded

    def query(self) -> bool:
        return self.number <= self.queue.reached

    def synchronize(self) -> None:
        self.queue.reached = max(self.queue.reached, self.number)

    def elapsed_time(self, end: Event) -> float:
        assert end.query()
        return 2.0 * (end.number - self.number)


def test_on_a_cpu_the_time_in_the_loader_counts() -> None:
    watch = Stopwatch()
    for _ in watch.watch(batches(3, seconds=0.02)):
        time.sleep(0.02)
    assert watch.images == 12
    assert 0.06 <= watch.waited < watch.seconds
    assert 0.2 < watch.idle < 0.8
    session = Stopwatch()
    session.add(watch)
    session.add(watch)
    assert (session.images, session.waited, session.idle) == (24, 2 * watch.waited, watch.idle)


def test_on_a_gpu_its_own_time_counts_and_is_waited_for_at_the_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    monkeypatch.setattr(torch.cuda, "Event", queue.event)
    watch = Stopwatch("cuda")
    for number, _ in enumerate(watch.watch(batches(5))):
        if number == 3:
            assert queue.reached == 0
            queue.reached = 4  # two steps have passed: they are counted on the way
    assert len(watch._spans) == 4
    assert watch.waited == pytest.approx(6 * 0.002)  # five batches, and finding that there are no more
    assert not watch._spans


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_host_that_is_held_up_does_not_count() -> None:
    watch = Stopwatch("cuda")
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in watch.watch(batches(5, seconds=0.01)):
        for _ in range(50):
            busy @ busy
    torch.cuda.synchronize()
    assert watch.waited < 0.03
