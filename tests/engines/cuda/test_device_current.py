"""On which GPU a thread's launches arrive, as far as it can be seen without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from qvit.engines.cuda.device import Gpu

OTHER, OWN = 100, 101  # contexts: GPU 0's, and GPU 1's, which is the engine's; 0 is none


class Driver:
    """What a thread has; the contexts of two GPUs."""

    def __init__(self, context: int) -> None:
        self.context = context

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, self.context

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self.context = context
        return (0,)


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices that PyTorch was told to go to."""
    devices: list[Any] = []

    @contextmanager
    def device(to: torch.device) -> Iterator[None]:
        devices.append(to)
        yield
        devices.append("back")

    monkeypatch.setattr(torch.cuda, "device", device)
    return devices


def gpu_for(driver: Driver) -> Gpu:
    gpu = object.__new__(Gpu)
    gpu.device = torch.device("cuda:1")
    gpu._driver, gpu._context = driver, OWN
    return gpu


@pytest.mark.parametrize("before", [OTHER, 0])
def test_the_engines_gpu_becomes_the_threads(before: int, entered: list[Any]) -> None:
    """Another GPU's thread, and a new one, which has no context."""
    driver = Driver(before)
    with gpu_for(driver).current():
        assert driver.context == OWN
        assert entered == [torch.device("cuda:1")]
    assert entered == [torch.device("cuda:1"), "back"]


def test_nothing_is_done_where_it_is_that_already(entered: list[Any]) -> None:
    driver = Driver(OWN)
    with gpu_for(driver).current():
        assert driver.context == OWN
    assert not entered
