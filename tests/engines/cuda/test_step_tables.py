"""Tables give the codes of their step functions on every sum, or are not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import qvit
from qvit.engines.cuda import step_tables
from qvit.engines.cuda.step_tables import StepTable, slots, step_table
from qvit.engines.cuda.thresholds import Steps, activation_steps
from qvit.spec import ModelSpec

Factory = Callable[..., Any]
REACH = 2000
EVERY = np.arange(-REACH, REACH + 1)[:, None]


def steps_of(rising: list[list[int]], falling: list[list[int]], lowest: int = 0) -> Steps:
    """Thresholds by channel."""
    channels = max(len(rising), len(falling))
    return Steps(
        np.full(channels, lowest),
        np.array(rising, np.int64).reshape(channels, -1).T,
        np.array(falling, np.int64).reshape(channels, -1).T,
        REACH,
    )


def is_right(steps: Steps, table: StepTable | str) -> bool:
    assert isinstance(table, StepTable), table
    sums = EVERY.repeat(len(steps.lowest), 1)
    return np.array_equal(table(sums), steps(sums))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_sum_behind_an_activation(bits: int, make_student: Factory, small_vit: Factory, perturb: Factory) -> None:
    student = perturb(make_student(small_vit(embed_dim=32, num_heads=1, depth=1), spec=ModelSpec.of_bits(bits)))
    (block,) = qvit.freeze(student).blocks
    steps = activation_steps(block.fc1, block.fc2.input, "gelu")
    assert isinstance(steps, Steps)
    table = step_table(steps)
    assert isinstance(table, StepTable), table
    sums = np.arange(-steps.reach, steps.reach + 1)[:, None].repeat(len(steps.lowest), 1)
    assert np.array_equal(table(sums), steps(sums))


@pytest.mark.parametrize(
    ("rising", "falling", "cells"),
    [
        ([100, 200, 300], [-400], 8),
        ([-REACH + 1, 0, REACH], [], 16),  # sums of 8 cells lie too near to each other
        ([REACH + 1, REACH + 1], [-REACH], 8),  # one code
        ([5, 5, 5], [], 8),  # several steps at once, at the edge of a cell
        ([0, 7, 14, 21, 28, 35, 42], [-30], 16),
        ([7 * i for i in range(15)], [-150, -160], 64),
    ],
)
def test_every_sum(rising: list[int], falling: list[int], cells: int) -> None:
    steps = steps_of([rising], [falling], 3)
    table = step_table(steps)
    assert is_right(steps, table)
    assert isinstance(table, StepTable)
    assert table.entries.shape == (1, cells)


def test_wider_cells_where_the_narrowest_do_not_separate_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_tables, "CELLS", (8,))
    steps = steps_of([[0, 20, 40, 60, 99]] * 9 + [[49, 60, 62, 78, 89]], [[]] * 10)
    assert is_right(steps, step_table(steps))
    monkeypatch.setattr(step_tables, "_TRIES", 1)
    assert isinstance(step_table(steps), str)


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        (steps_of([[1, 2]], [], -1), "codes with a sign"),
        (steps_of([[0, 1, 2, 1000]], []), "channels whose steps are too near to each other for 128 cells"),
    ],
)
def test_where_there_is_none(steps: Steps, why: str) -> None:
    assert step_table(steps) == why


@pytest.mark.parametrize("width", [32, 64, 128])
def test_slots_put_a_lanes_columns_next_to_each_other(width: int) -> None:
    columns = slots(width, 256)
    assert np.array_equal(np.sort(columns), np.arange(256))
    for start in range(0, 256, width):
        for lane in range(4):
            own = columns[start : start + width].reshape(-1, 4, 2)[:, lane].reshape(-1)
            assert np.array_equal(own, start + lane * width // 4 + np.arange(width // 4))


@pytest.mark.parametrize("width", [64, 128])
def test_slots_of_planes_are_within_the_lanes_columns(width: int) -> None:
    columns = slots(width, 256, planes=True)
    assert np.array_equal(np.sort(columns), np.arange(256))
    assert np.array_equal(columns // (width // 4), slots(width, 256) // (width // 4))
