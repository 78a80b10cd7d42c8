"""Step functions of whole sums as tables that the kernels read in a few instructions a sum.

A channel's thresholds lie within a range of sums. Its first sum is at w = 0 and the range is cut into equal cells, each with at
most one step inside:

    w     = min(max(sum + shift, 0), most)
    u     = w * factor                               cell in the bits from 24 on, place in the cell below
    entry = entries[u >> 24]                         16 bits
    code  = |(entry + (u >> 16) >> 8) % 256 - 128|

An entry has 128 + code in its higher byte, where the function rises, or 128 - code, where it falls, less its cell, which u adds
again; in its lower byte it has 256 less the place of its step, so that the sum carries from there on. Nothing is rounded: that
a table gives the codes is checked at both ends of every cell and on both sides of every step, and between these both the table
and the function are constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qvit.engines.cuda.thresholds import Steps

CELLS = (8, 16, 32, 64)  # a channel; the fewest that do
_SHIFT, _PLACE = 24, 16  # of u: the cell, the place in the cell in steps of 1/256
_TRIES = 48  # widths of a cell that are tried
_HOPELESS = 4  # one part in so many channels that are wrong at first
_MIDDLE = 128


@dataclass(frozen=True, eq=False)
class StepTable:
    """The tables of M channels.

    Attributes:
        entries: uint16 [M, cells].
        shift, most, factor: int64 [M].
    """

    entries: np.ndarray
    shift: np.ndarray
    most: np.ndarray
    factor: np.ndarray

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        """Codes of sums [.., M]; what the kernels compute."""
        w = (sums + self.shift).clip(0, self.most)
        u = w * self.factor
        entry = self.entries[np.arange(len(self.shift)), u >> _SHIFT].astype(np.int64)
        return np.abs((entry + (u >> _PLACE) >> 8) % 256 - _MIDDLE)


def step_table(steps: Steps) -> StepTable | str:
    """The table of step functions with codes from 0 on, or why there is none."""
    if steps.lowest.min() < 0:
        return "codes with a sign"
    thresholds = np.concatenate([steps.rising, steps.falling])
    there = (thresholds > -steps.reach) & (thresholds <= steps.reach)
    first = np.where(there, thresholds, steps.reach).min(0, initial=steps.reach)
    last = np.where(there, thresholds, -steps.reach).max(0, initial=-steps.reach)
    shift, most = 1 - first, np.maximum(last - first + 1, 0)
    for cells in CELLS:
        table = _with_cells(steps, shift, most, cells)
        if table is not None:
            return table
    return f"channels whose steps are too near to each other for {CELLS[-1]} cells"


def _with_cells(steps: Steps, shift: np.ndarray, most: np.ndarray, cells: int) -> StepTable | None:
    """Cells as narrow as they can be, then a little wider, until they separate the steps of every channel."""
    narrowest = np.minimum(((cells << _SHIFT) - 1) // np.maximum(most, 1), 1 << _SHIFT)
    if narrowest.min() >> _PLACE == 0:
        return None  # several sums at one place
    factor, entries = narrowest.copy(), np.zeros((len(shift), cells), np.uint16)
    left = np.arange(len(shift))
    for attempt in range(_TRIES):
        factor[left] = narrowest[left] - narrowest[left] * attempt // (2 * _TRIES)
        part = Steps(steps.lowest[left], steps.rising[:, left], steps.falling[:, left], steps.reach)
        table = _fill(part, shift[left], most[left], factor[left], cells)
        entries[left] = table.entries
        left = left[~_is_right(table, part)]
        if not len(left):
            return StepTable(entries, shift, most, factor)
        if len(left) * _HOPELESS > len(shift):
            break
    return None


def _ends(most: np.ndarray, factor: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last w of every cell [cells, M]; beyond ``most`` where a cell is not used."""
    cell = np.arange(cells + 1)[:, None] << _SHIFT
    starts = -(-cell // factor)
    return starts[:-1], np.minimum(starts[1:] - 1, most)


def _fill(steps: Steps, shift: np.ndarray, most: np.ndarray, factor: np.ndarray, cells: int) -> StepTable:
    starts, ends = _ends(most, factor, cells)
    sums = starts - shift
    codes = steps(sums)
    falls = np.zeros(sums.shape, bool)
    step = np.zeros(sums.shape, np.int64)  # w of the step inside a cell, 0 where there is none
    for thresholds, falling in ((steps.rising, False), (steps.falling, True)):
        for threshold in thresholds + shift:
            step = np.where((threshold > starts) & (threshold <= ends), threshold, step)
            if falling:
                falls |= threshold > starts
    high = np.where(falls, _MIDDLE - codes, _MIDDLE + codes) - np.arange(cells)[:, None]
    entries = 256 * high + np.where(step > 0, 256 - (step * factor >> _PLACE) % 256, 0)
    return StepTable(entries.T.astype(np.uint16), shift, most, factor)


def _is_right(table: StepTable, steps: Steps) -> np.ndarray:
    """Whether each channel's table gives its codes, bool [M]."""
    starts, ends = _ends(table.most, table.factor, table.entries.shape[1])
    thresholds = np.concatenate([steps.rising, steps.falling])
    inside = np.concatenate([starts, ends]).clip(0, table.most) - table.shift
    sums = np.concatenate([inside, thresholds - 1, thresholds]).clip(-steps.reach, steps.reach)
    return np.asarray((table(sums) == steps(sums)).all(0))


def slots(width: int, columns: int, planes: bool = False) -> np.ndarray:
    """The column of each place in a product whose columns are permuted, int64 [columns].

    A lane of a warp has two neighbouring columns of every eight. Permuted, those that it has of ``width`` columns are a
    quarter of them, one after the other, so that its codes go out as they are; as planes of bits, in the order in which
    ``src/epilogue_activation.cuh`` joins bits.
    """
    place = np.arange(columns)
    fragment, lane, second = place % width // 8, place % 8 // 2, place % 2
    own = 2 * fragment + second
    if planes:
        half = width // 16  # fragments of a group
        own = half * (2 * (fragment % 2) + second) + 2 * (fragment % half // 2) + fragment // half
    return place - place % width + lane * (width // 4) + own
