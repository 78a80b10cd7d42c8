"""Arrays are padded and filled on their way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvit.engines.cuda.folded.arrays import Constants, by_channel

TO = Constants(torch.device("cpu"))


def test_vectors_are_padded() -> None:
    assert TO.floats(2.5, 3).tolist() == [2.5, 2.5, 2.5]
    assert TO.floats(np.array([[0.5]]), 2, 4, 1.0).tolist() == [0.5, 0.5, 1.0, 1.0]
    assert TO.floats(np.arange(3), 3, 5).tolist() == [0.0, 1.0, 2.0, 0.0, 0.0]
    assert TO.floats(np.arange(3), 3, 3).tolist() == [0.0, 1.0, 2.0]
    assert TO.floats(7.0, 1, 2).dtype == torch.float32
    with pytest.raises(ValueError, match="broadcast"):
        TO.floats(np.arange(3), 2)


def test_arrays_go_as_they_are() -> None:
    every_second = np.arange(12, dtype=np.uint8).reshape(3, 4)[:, ::2]
    moved = TO.array(every_second)
    assert moved.dtype == torch.uint8
    assert moved.is_contiguous()
    assert moved.tolist() == [[0, 2], [4, 6], [8, 10]]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([2.0]), [[2, 2, 2], [2, 2, 2]]),
        (np.array([1.0, 2.0]).reshape(2, 1, 1), [[1, 1, 1], [2, 2, 2]]),
        (np.arange(6.0).reshape(2, 1, 3), [[0, 1, 2], [3, 4, 5]]),
    ],
)
def test_one_number_one_a_head_or_one_a_channel(values: np.ndarray, wanted: list[list[float]]) -> None:
    found = by_channel(values, (2, 3))
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert found.tolist() == wanted
