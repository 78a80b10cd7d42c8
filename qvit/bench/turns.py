"""Taking turns, and what the times say: whatever slows the machine down for a while slows all down alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Turn = Callable[[], list[float]]

_PAUSE = 0.02  # seconds between turns, in which the threads of the one before go to sleep


def take_turns(turns: Sequence[Turn], rounds: Iterable[int]) -> list[list[list[float]]]:
    """Lets each run once a round, a different one first in every round.

    Args:
        turns: functions that run for a moment and return the milliseconds of each call.
        rounds: their numbers.

    Returns:
        For each of ``turns``, for each round, the milliseconds of its calls.
    """
    times: list[list[list[float]]] = [[] for _ in turns]
    for number in rounds:
        for position in range(len(turns)):
            index = (number + position) % len(turns)
            time.sleep(_PAUSE)
            times[index].append(turns[index]())
    return times


@dataclass(frozen=True)
class Timing:
    """Of all calls, in milliseconds."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, rounds: Sequence[Sequence[float]]) -> Timing:
        """Over the calls of all rounds."""
        p10, median, p90 = np.percentile(np.concatenate([np.asarray(calls) for calls in rounds]), [10, 50, 90])
        return cls(float(median), float(p10), float(p90))


def ratio(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """How many times faster we are than they, over rounds: median, 10th and 90th percentile of their median over ours.

    The two are compared within each round, where they ran right after each other.
    """
    paired = [float(np.median(b) / np.median(a)) for a, b in zip(ours, theirs, strict=True)]
    p10, median, p90 = np.percentile(paired, [10, 50, 90])
    return float(median), float(p10), float(p90)
