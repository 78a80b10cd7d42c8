"""Comparisons give the codes of their step functions on every sum, or are not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qvit
from qvit.engines.cuda import step_tables
from qvit.engines.cuda.comparisons import MOST, Comparisons, comparisons, packed, slots
from qvit.engines.cuda.thresholds import Steps, activation_steps
from qvit.spec import ModelSpec

Factory = Callable[..., Any]
REACH = 200


def steps_of(*channels: tuple[int, list[int], list[int]], reach: int = REACH) -> Steps:
    """Of the lowest code, rising and falling thresholds of each channel."""
    lowest, rising, falling = zip(*channels, strict=True)
    up, down = (max(len(one) for one in thresholds) for thresholds in (rising, falling))
    return Steps(
        np.array(lowest),
        np.array([[*one, *[reach + 1] * (up - len(one))] for one in rising], np.int64).reshape(len(lowest), up).T,
        np.array([[*one, *[-reach] * (down - len(one))] for one in falling], np.int64).reshape(len(lowest), down).T,
        reach,
    )


def is_right(steps: Steps, found: Comparisons | str) -> bool:
    assert isinstance(found, Comparisons), found
    sums = np.arange(-steps.reach, steps.reach + 1)[:, None].repeat(len(steps.lowest), 1)
    return np.array_equal(found(sums), steps(sums))


@st.composite
def channels(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """At most one step down, left of the steps up; some at the ends of what sums reach, or beyond, where they do not count."""
    place = st.one_of(st.integers(-REACH, REACH + 1), st.sampled_from([-REACH, 1 - REACH, REACH, REACH + 1]))
    lowest = draw(st.integers(0, 3))
    least = draw(place)
    rising = sorted(max(one, least) for one in draw(st.lists(place, max_size=3 - lowest)))
    return lowest, rising, [least] if lowest < 3 and draw(st.booleans()) else []


@given(st.lists(channels(), min_size=1, max_size=6))
def test_every_sum(drawn: list[tuple[int, list[int], list[int]]]) -> None:
    steps = steps_of(*drawn)
    found = comparisons(steps)
    if isinstance(found, str):
        assert found == "0 steps, not 1 to 4"
        every = steps(np.array([[-REACH], [REACH]]).repeat(len(drawn), 1))
        assert (every == 0).all()
    else:
        assert is_right(steps, found)
        assert len(found.add) == found.rising + found.falling <= MOST
        assert found.column_bytes == 2 * len(found.add)


@pytest.mark.parametrize("reach", [16383, 16384])
def test_sums_and_their_distance_from_a_threshold_take_16_bits(reach: int) -> None:
    steps = steps_of((0, [1 - reach, 0, reach], [-reach + 1]), (1, [reach], [0]), reach=reach)
    found = comparisons(steps)
    if reach == 16383:
        assert is_right(steps, found)
    else:
        assert found == "sums of up to 16384, whose distance from a threshold takes more than 16 bits"


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        (steps_of((-1, [1], [])), "codes with a sign"),
        (steps_of((0, [1, 2, 3, 4], [])), "more codes than of two bits"),
        (steps_of((0, [], [-1, -2, -3, -4])), "more codes than of two bits"),
        (steps_of((0, [1, 2, 3], []), (0, [1], [0, -1])), "5 steps, not 1 to 4"),
        (steps_of((0, [REACH + 1], [])), "0 steps, not 1 to 4"),
    ],
)
def test_where_there_are_none(steps: Steps, why: str) -> None:
    assert comparisons(steps) == why


def test_what_is_wrong_is_found() -> None:
    assert (
        comparisons(Steps(np.zeros(1, int), np.array([[REACH + 1], [5]]), np.zeros((0, 1), int), REACH))
        == "thresholds in no order"
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu"])
def test_every_sum_behind_an_activation(activation: str, make_student: Factory, small_vit: Factory, perturb: Factory) -> None:
    student = perturb(make_student(small_vit(embed_dim=32, num_heads=1, depth=1), spec=ModelSpec.of_bits(2)))
    (block,) = qvit.freeze(student).blocks
    steps = activation_steps(block.fc1, block.fc2.input, activation)
    assert isinstance(steps, Steps)
    assert is_right(steps, comparisons(steps))


@pytest.mark.parametrize("width", [64, 128])
def test_a_lane_finds_the_thresholds_of_its_two_columns(width: int) -> None:
    """As ``src/epilogue_compare.cuh`` reads them: 16 bytes for two columns of each of four fragments."""
    m, rng = 40, np.random.default_rng(0)
    table = Comparisons(rng.integers(-9, 9, (3, m)).astype(np.int16), 2, 1)
    columns = slots(width, 256)
    found = packed(table, columns)
    assert found.nbytes == 256 * table.column_bytes
    for place in np.flatnonzero(columns < m):
        part = found.reshape(-1, width * table.column_bytes)[place // width].view(np.int16).reshape(-1, 4, 8)
        fragment, lane, second = place % width // 8, place % 8 // 2, place % 2
        for i in range(3):
            assert part[fragment // 4 * 3 + i, lane, 2 * (fragment % 4) + second] == table.add[i, columns[place]]


@pytest.mark.parametrize("width", [64, 128])
def test_slots_are_within_the_lanes_columns(width: int) -> None:
    columns = slots(width, 256)
    assert np.array_equal(np.sort(columns), np.arange(256))
    assert np.array_equal(columns // (width // 4), step_tables.slots(width, 256) // (width // 4))
