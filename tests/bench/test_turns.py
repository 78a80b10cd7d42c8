"""Taking turns and the statistics of it."""

from __future__ import annotations

import numpy as np
import pytest

from qvit.bench.turns import Timing, ratio, take_turns


def test_everyone_has_a_turn_in_every_round_and_the_first_changes() -> None:
    order: list[int] = []

    def turn(index: int) -> list[float]:
        order.append(index)
        return [float(index), float(len(order))]

    times = take_turns([lambda i=i: turn(i) for i in range(3)], range(4))  # type: ignore[misc]
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert [len(rounds) for rounds in times] == [4, 4, 4]
    assert all(calls[0] == index for index, rounds in enumerate(times) for calls in rounds)


def test_timing_is_over_all_calls() -> None:
    timing = Timing.of([[1.0, 2.0], [3.0], [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]])
    assert (timing.p10, timing.median, timing.p90) == (2.0, 6.0, 10.0)


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine is ten times slower in the second round; they are twice as slow as we are in each.
    ours, theirs = [[1.0, 1.0, 1.2], [10.0, 10.0]], [[2.0], [20.0, 19.0, 21.0]]
    assert ratio(ours, theirs) == (2.0, 2.0, 2.0)
    spread = ratio([[1.0]] * 11, [[1 + i / 10] for i in range(11)])
    np.testing.assert_allclose(spread, (1.5, 1.1, 1.9))


def test_rounds_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratio([[1.0]], [[1.0], [2.0]])
