"""Step functions of whole sums as tables that the kernels read in a few instructions a sum.

A channel's thresholds lie within a range of sums. It begins at u = 0 and is cut into equal cells, each with at most one step
inside:

    u     = min(max(sum * factor + add, 0), last)    cell in the bits from 16 on, place in the cell below
    entry = entries[u >> 16]                         16 bits
    code  = |((entry << 8) + u >> 16) % 256 - 128|

An entry has 128 + code in its higher byte, where the function rises, or 128 - code, where it falls, less its cell, which u adds
again; in its lower byte it has 256 less the place of its step, so that the sum carries from there on. Nothing is rounded, and u
is within 32 bits for every sum that there can be. That a table gives the codes is checked at both ends of every cell, on both
sides of every step and at the least and largest sum, and between these both the table and the function are constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qvit.engines.cuda.thresholds import Steps

CELLS = (8, 16, 32, 64, 128)  # a channel; the fewest that do
_SHIFT, _PLACE = 16, 8  # of u: the cell, the place in the cell in steps of 1/256
_TRIES = 48  # widths of a cell that are tried
_HOPELESS = 4  # one part in so many channels that are wrong at first
_MIDDLE = 128


@dataclass(frozen=True, eq=False)
class StepTable:
    """The tables of M channels.

    Attributes:
        entries: uint16 [M, cells].
        factor, add: int64 [M].
    """

    entries: np.ndarray
    factor: np.ndarray
    add: np.ndarray

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        """Codes of sums [.., M]; what the kernels compute."""
        u = (sums * self.factor + self.add).clip(0, (self.entries.shape[1] << _SHIFT) - 1)
        entry = self.entries[np.arange(len(self.add)), u >> _SHIFT].astype(np.int64)
        return np.abs(((entry << 8) + u >> _SHIFT) % 256 - _MIDDLE)


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
    largest = np.iinfo(np.int32).max // (steps.reach + np.abs(shift))  # u before it is clipped is within 32 bits
    narrowest = np.minimum(((cells << _SHIFT) - 1) // np.maximum(most, 1), np.minimum(largest, 1 << _SHIFT))
    if narrowest.min() >> _PLACE == 0:
        return None  # several sums at one place
    factor, entries = narrowest.copy(), np.zeros((len(shift), cells), np.uint16)
    left = np.arange(len(shift))
    for attempt in range(_TRIES):
        factor[left] = narrowest[left] - narrowest[left] * attempt // (2 * _TRIES)
        part = Steps(steps.lowest[left], steps.rising[:, left], steps.falling[:, left], steps.reach)
        table = _fill(part, shift[left], most[left], factor[left], cells)
        entries[left] = table.entries
        left = left[~_is_right(table, part, shift[left], most[left])]
        if not len(left):
            return StepTable(entries, factor, shift * factor)
        if len(left) * _HOPELESS > len(shift):
            break
    return None


def _ends(most: np.ndarray, factor: np.ndarray, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last sum + shift of every cell [cells, M]; beyond ``most`` where nothing changes any more."""
    cell = np.arange(cells + 1)[:, None] << _SHIFT
    starts = -(-cell // factor)
    return starts[:-1], np.minimum(starts[1:] - 1, most)


def _fill(steps: Steps, shift: np.ndarray, most: np.ndarray, factor: np.ndarray, cells: int) -> StepTable:
    starts, ends = _ends(most, factor, cells)
    codes = steps((starts - shift).clip(-steps.reach, steps.reach))
    falls = np.zeros(codes.shape, bool)
    step = np.zeros(codes.shape, np.int64)  # sum + shift of the step inside a cell, 0 where there is none
    for thresholds, falling in ((steps.rising, False), (steps.falling, True)):
        for threshold in thresholds + shift:
            step = np.where((threshold > starts) & (threshold <= ends), threshold, step)
            if falling:
                falls |= threshold > starts
    high = np.where(falls, _MIDDLE - codes, _MIDDLE + codes) - np.arange(cells)[:, None]
    entries = 256 * high + np.where(step > 0, 256 - (step * factor >> _PLACE) % 256, 0)
    return StepTable(entries.T.astype(np.uint16), factor, shift * factor)


def _is_right(table: StepTable, steps: Steps, shift: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Whether each channel's table gives its codes, bool [M]."""
    cells = np.concatenate(_ends(most, table.factor, table.entries.shape[1]))
    thresholds = np.concatenate([steps.rising, steps.falling])
    far = np.full((1, len(shift)), steps.reach)
    sums = np.concatenate([cells - shift, thresholds - 1, thresholds, -far, far]).clip(-steps.reach, steps.reach)
    return np.asarray((table(sums) == steps(sums)).all(0))


def column_bytes(cells: int) -> int:
    """Of a column in what `packed` gives."""
    return 8 + 2 * cells


def packed(table: StepTable, columns: np.ndarray, width: int) -> np.ndarray:
    """What the kernels read of columns, ``width`` of them after the other, uint8 [columns * column_bytes].

    First factor and add of each column, int32 [width, 2]; then entries, uint16 [width / 8, cells, 8]: what the lanes of a quad
    read of eight columns, each of its own two, lies in different banks of shared memory.

    Args:
        table: of the columns.
        columns: the column of each place; where there is none, anything may be.
        width: of the part of a product that an epilogue has.
    """
    cells = table.entries.shape[1]
    missing = int(columns.max()) + 1 - len(table.add)
    numbers = np.pad(np.stack([table.factor, table.add], 1), ((0, missing), (0, 0)))[columns].astype(np.int32)
    entries = np.pad(table.entries, ((0, missing), (0, 0)))[columns].reshape(-1, 8, cells).transpose(0, 2, 1)
    parts = [np.ascontiguousarray(part).view(np.uint8).reshape(len(columns) // width, -1) for part in (numbers, entries)]
    return np.concatenate(parts, 1).reshape(-1)


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
