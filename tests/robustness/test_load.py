"""Many threads at one model, many models at once, and many calls: the same answers, and no memory lost."""

from __future__ import annotations

import gc
import os
import threading
import time
from typing import Any

import numpy as np
import pytest

from qvit.bench.worker import memory
from qvit.engines import Runner, create_engine
from qvit.integer.model import IntegerModel
from tests.robustness.budgets import CALLS, SECONDS

_MB_PER_THOUSAND_CALLS = 0.3
_MB_NOISE = 2.0
_keeps_freed_memory = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer keeps freed memory for a while"
)


def _hammer(jobs: list[Any], seconds: float) -> int:
    """Runs each job over and over on a thread of its own; returns the number of calls and raises what one of them raised."""
    end, counts, errors = time.monotonic() + seconds, [0] * len(jobs), []

    def loop(index: int) -> None:
        try:
            while time.monotonic() < end:
                jobs[index]()
                counts[index] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert min(counts) > 0
    return sum(counts)


@pytest.mark.parametrize("name", ["w4a4", "w2a2"])
def test_eight_threads_at_one_model(runners: dict[str, Runner], name: str) -> None:
    runner, rng = runners[name], np.random.default_rng(0)
    batches = [rng.integers(0, 256, (size, 3, 16, 16), dtype=np.uint8) for size in (1, 2, 3, 5, 1, 8, 2, 1)]
    expected = [runner(batch) for batch in batches]

    def job(index: int) -> None:
        assert np.array_equal(runner(batches[index]), expected[index])

    _hammer([lambda i=i: job(i) for i in range(8)], SECONDS)  # type: ignore[misc]


def test_several_models_and_numbers_of_threads_at_once(models: dict[str, IntegerModel], pixels: np.ndarray) -> None:
    runners = [Runner(model, create_engine(model, "cpu", threads=t)) for model in models.values() for t in (1, 2, 5)]
    expected = [runner(pixels) for runner in runners]

    def job(index: int) -> None:
        assert np.array_equal(runners[index](pixels), expected[index])

    _hammer([lambda i=i: job(i) for i in range(len(runners))], SECONDS)  # type: ignore[misc]


def test_models_that_come_and_go_while_others_run(models: dict[str, IntegerModel], runners: Any, pixels: np.ndarray) -> None:
    expected = {name: runners[name](pixels) for name in models}

    def come_and_go(name: str) -> None:
        assert np.array_equal(create_engine(models[name], "cpu", threads=2).run(pixels), expected[name])

    def run(name: str) -> None:
        assert np.array_equal(runners[name](pixels), expected[name])

    _hammer([lambda n=n: come_and_go(n) for n in models] + [lambda n=n: run(n) for n in models], SECONDS)  # type: ignore[misc]


def _growth(call: Any, calls: int) -> float:
    """MB that resident memory grew by over so many calls, after as many as it takes to settle.

    The least of two times: what leaks does so each time, what the allocator or a test before it caused does not.
    """
    for _ in range(min(200, calls)):
        call()
    grown = []
    for _ in range(2):
        gc.collect()
        before = memory()["now_mb"]
        for _ in range(calls):
            call()
        gc.collect()
        grown.append(memory()["now_mb"] - before)
    return min(grown)


@_keeps_freed_memory
def test_memory_stays_flat_over_calls(runners: dict[str, Runner], pixels: np.ndarray) -> None:
    floats = runners["w4a4"].model.preprocessing.normalise(pixels)
    bad = np.full_like(floats, np.nan)
    taps: dict[str, Any] = {}

    def call() -> None:
        runners["w4a4"](pixels)
        runners["w2a2"](floats[:1])
        runners["w4a4"].engine.forward(floats, taps)
        with pytest.raises(ValueError, match="not finite"):
            runners["w4a4"](bad)

    assert _growth(call, CALLS) < _MB_NOISE + _MB_PER_THOUSAND_CALLS * CALLS / 1000


@_keeps_freed_memory
def test_memory_stays_flat_over_models(models: dict[str, IntegerModel], pixels: np.ndarray) -> None:
    calls = CALLS // 20
    assert _growth(lambda: create_engine(models["w4a4"], "cpu", threads=2).run(pixels), calls) < _MB_NOISE + calls / 1000
