"""The integer program against trying all choices."""

from __future__ import annotations

import itertools
import os
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qvit.analyze.choose
from qvit.analyze.choose import choose


def _best(damages: np.ndarray, costs: list[np.ndarray], limits: list[int]) -> float | None:
    """The least sum of damages over all choices that keep the limits."""
    units = np.arange(len(damages))
    sums = [
        damages[units, options].sum()
        for options in map(list, itertools.product(range(damages.shape[1]), repeat=len(damages)))
        if all(int(cost[units, options].sum()) <= limit for cost, limit in zip(costs, limits, strict=True))
    ]
    return min(sums, default=None)


@st.composite
def _problems(draw: st.DrawFn) -> tuple[np.ndarray, list[np.ndarray], list[int]]:
    units, options = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size = units * options

    def table(values: st.SearchStrategy) -> np.ndarray:
        return np.array(draw(st.lists(values, min_size=size, max_size=size))).reshape(units, options)

    damages = table(st.one_of(st.just(0.0), st.floats(1e-8, 10.0)))
    costs, limits = [], []
    for _ in range(draw(st.integers(0, 2))):
        largest, unit = draw(st.integers(1, 10**6)), draw(st.sampled_from([1, 7, 384 * 384]))
        cost = table(st.integers(0, largest)).astype(np.int64) * unit
        costs.append(cost)
        # Between what nothing meets and what everything does; often exactly what one choice takes.
        limits.append(draw(st.one_of(st.integers(0, int(cost.max(axis=1).sum())), st.sampled_from(_sums(cost)))))
    return damages, costs, limits


def _sums(cost: np.ndarray) -> list[int]:
    return sorted({int(cost[np.arange(len(cost)), option].sum()) for option in range(cost.shape[1])})


@given(_problems())
def test_as_good_as_trying_everything(problem: tuple[np.ndarray, list[np.ndarray], list[int]]) -> None:
    damages, costs, limits = problem
    chosen, best = choose(damages, costs, limits), _best(damages, costs, limits)
    assert (chosen is None) == (best is None)
    if chosen is not None:
        units = np.arange(len(damages))
        for cost, limit in zip(costs, limits, strict=True):
            assert int(cost[units, chosen].sum()) <= limit
        assert damages[units, chosen].sum() <= best * (1 + 1e-9) + 1e-13


def test_a_limit_is_kept_to_the_byte() -> None:
    damages = np.array([[3.0, 1.0], [2.0, 1.0]])
    cost = np.array([[1_000_003, 2_000_005], [1_000_003, 2_000_005]], dtype=np.int64)
    for limit, expected in (
        (2_000_005, None),
        (2_000_006, [0, 0]),
        (3_000_007, [0, 0]),
        (3_000_008, [1, 0]),
        (4_000_010, [1, 1]),
    ):
        chosen = choose(damages, [cost], [limit])
        assert (None if chosen is None else chosen.tolist()) == expected


def test_a_whole_vit_takes_a_moment() -> None:
    rng = np.random.default_rng(0)
    bits = np.array([2, 3, 4, 8])
    damages = 10.0 ** rng.uniform(-4, 0, (60, 1)) * 4.0**-bits * rng.uniform(0.8, 1.2, (60, 4))
    sizes = np.tile([3, 0, 1, 4, 4], 12)[:, None] * 384 * 384
    work = np.tile([3, 1, 1, 4, 4], 12)[:, None] * 197 * 384 * 384
    costs = [sizes * bits // 8, work * bits**2]
    limits = [int(cost[:, 1].sum()) for cost in costs]
    chosen = choose(damages, costs, limits)
    assert chosen is not None
    units = np.arange(60)
    assert damages[units, chosen].sum() < damages[:, 1].sum()
    # Layers without weights are not narrowed for bytes alone.
    wide = choose(damages, costs[:1], limits[:1])
    assert wide is not None
    assert set(wide[1::5]) == {3}


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    solve = qvit.analyze.choose.milp

    def talkative(*arguments: Any, **options: Any) -> Any:
        os.write(1, b"debugging\n")
        return solve(*arguments, **options)

    monkeypatch.setattr(qvit.analyze.choose, "milp", talkative)
    print("before")
    assert choose(np.ones((2, 2)), [np.ones((2, 2), dtype=np.int64)], [2]) is not None
    print("after")
    sys.stdout.flush()
    os.write(1, b"end\n")
    assert capfd.readouterr() == ("before\nafter\nend\n", "")


def test_units_that_do_not_matter() -> None:
    assert choose(np.zeros((2, 2)), [np.ones((2, 2), dtype=np.int64)], [2]) is not None
    with pytest.raises(ValueError, match="zip"):
        choose(np.zeros((2, 2)), [np.ones((2, 2), dtype=np.int64)], [])
