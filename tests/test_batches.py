"""Batches of pixels: in order, ahead of who takes them, and an error where its image would have come."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qvit.batches import PixelBatches, in_batches, map_ahead, prepare
from qvit.errors import InputError
from qvit.preprocessing import Preprocessing


class Source:
    """Images whose pixels are their number."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.classes = ["even", "odd"]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.full((4, 6), index, np.uint8)), index % 2


@given(st.lists(st.integers(), max_size=60), st.integers(0, 4), st.integers(0, 9))
def test_results_come_in_order(items: list[int], workers: int, ahead: int) -> None:
    assert list(map_ahead(lambda x: x + 1, items, workers, ahead)) == [x + 1 for x in items]


def test_several_run_at_once() -> None:
    # Three that wait for each other end only if all three run.
    barrier = threading.Barrier(3, timeout=20)
    assert sorted(map_ahead(lambda _: barrier.wait(), range(3), 3, 3)) == [0, 1, 2]


def test_work_goes_on_while_nobody_asks_and_stops_at_the_limit() -> None:
    done: list[int] = []
    items = map_ahead(lambda x: done.append(x) or x, range(100), 2, 5)  # type: ignore[func-returns-value]
    assert next(items) == 0
    for _ in range(200):
        if len(done) == 6:
            break
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(done) == [0, 1, 2, 3, 4, 5]
    assert list(items) == list(range(1, 100))


def test_an_error_comes_in_its_place_and_ends_it() -> None:
    def fail_at_three(x: int) -> int:
        if x == 3:
            raise InputError("the third")
        return x

    items = map_ahead(fail_at_three, range(10), 2, 4)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(InputError, match="the third"):
        next(items)
    assert list(items) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_leaves_no_thread_behind(workers: int) -> None:
    items: Iterator[Any] = map_ahead(lambda x: x, range(1000), workers, 10)
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("qvit-images")]


def test_batches_of_anything() -> None:
    assert list(in_batches(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(in_batches([], 3)) == []


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 8, 11])
def test_every_image_once(count: int, workers: int) -> None:
    batches = PixelBatches(Source(count), Preprocessing((1, 4, 6), mean=(0.5,), std=(0.5,)), 4, workers)
    assert len(batches) == -(-count // 4)
    for _ in range(2):
        got = list(batches)
        assert [len(labels) for _, labels in got] == [4] * (count // 4) + [count % 4] * bool(count % 4)
        assert [int(p[0, 0, 0]) for pixels, _ in got for p in pixels] == list(range(count))
        assert [label for _, labels in got for label in labels] == [i % 2 for i in range(count)]
        assert all(pixels.dtype == np.uint8 and pixels.shape[1:] == (1, 4, 6) for pixels, _ in got)


def test_only_some_images() -> None:
    batches = PixelBatches(Source(50), Preprocessing((1, 4, 6), mean=(0.5,), std=(0.5,)), 3, 2, [4, 40, 7, 8])
    assert len(batches) == 2
    assert [pixels[:, 0, 0, 0].tolist() for pixels, _ in batches] == [[4, 40, 7], [8]]


def test_an_image_that_cannot_be_prepared_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessing = Preprocessing((1, 4, 6), mean=(0.5,), std=(0.5,))

    def fail(*_args: object) -> None:
        raise ValueError("too odd")

    monkeypatch.setattr(Image.Image, "crop", fail)
    with pytest.raises(InputError, match=r"cat\.png cannot be prepared .*too odd"):
        prepare(preprocessing, Image.new("L", (9, 9)), "cat.png")
    with pytest.raises(InputError, match="5 channels"):
        prepare(Preprocessing((5, 4, 4), mean=(0.5,) * 5, std=(0.5,) * 5), Image.new("L", (9, 9)), "cat.png")


def test_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['timm'] = None; import qvit.batches, qvit.accuracy, qvit.sources"
    subprocess.run([sys.executable, "-c", code], check=True)
