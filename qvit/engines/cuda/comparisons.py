"""Two-bit codes as comparisons of whole sums with thresholds, of two sums at a time.

Where steps are few, counting those that a sum has passed takes fewer instructions than a table (`step_tables`), and no loads
but those of the thresholds. Hopper does it for the 16-bit halves of a register in one instruction:

    passed(threshold) = max(min(sum + (1 - threshold), 1), 0)
    code              = passed(rising) + .. + falling thresholds - passed(falling) - ..

All channels have as many thresholds: one that every sum passes for each code below a channel's lowest, one that none passes
where there are fewer. Checked: sums stay within 16 bits, and codes are right at the least and largest sum and on both sides of
every step; between these nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qvit.engines.cuda.thresholds import Steps

MOST = 4  # thresholds of a channel: as many bytes as a table has of it beside its entries
_HIGHEST = 3  # code of two bits
_TOGETHER = 4  # fragments of eight columns whose thresholds a lane reads at once
_INT16 = np.iinfo(np.int16)


@dataclass(frozen=True, eq=False)
class Comparisons:
    """The thresholds of M channels.

    Attributes:
        add: int16 [R + F, M], one less its threshold; first those of steps up, then those of steps down.
        rising, falling: R and F.
    """

    add: np.ndarray
    rising: int
    falling: int

    def __call__(self, sums: np.ndarray) -> np.ndarray:
        """Codes of sums [.., M]; what the kernels compute, in 16 bits."""
        passed = (sums.astype(np.int16)[..., None, :] + self.add).clip(0, 1).astype(np.int64)
        return np.asarray(passed[..., : self.rising, :].sum(-2) + (1 - passed[..., self.rising :, :]).sum(-2))

    @property
    def column_bytes(self) -> int:
        """Of a column in what `packed` gives."""
        return 2 * len(self.add)


def comparisons(steps: Steps) -> Comparisons | str:
    """The comparisons that give the codes of step functions, or why there are none."""
    reach, channels = steps.reach, len(steps.lowest)
    if steps.lowest.min() < 0:
        return "codes with a sign"
    rises, falls = ((steps.rising <= reach).sum(0), (steps.falling > -reach).sum(0))  # that a sum can pass
    rising, falling = int((steps.lowest + rises).max()), int(falls.max())
    if max(rising, (steps.lowest + falls).max()) > _HIGHEST:
        return "more codes than of two bits"
    if not 0 < rising + falling <= MOST:
        return f"{rising + falling} steps, not 1 to {MOST}"
    if 2 * reach + 1 > _INT16.max:
        return f"sums of up to {reach}, whose distance from a threshold takes more than 16 bits"
    up = np.full((rising, channels), reach + 1)
    for code in range(rising):
        own = code - steps.lowest  # which of a channel's steps leads to this code and on
        there = (own >= 0) & (own < len(steps.rising))
        if len(steps.rising):
            up[code, there] = steps.rising[own[there], np.flatnonzero(there)]
        up[code, own < 0] = -reach
    thresholds = np.concatenate([up, steps.falling[:falling]]).clip(-reach, reach + 1)
    found = Comparisons((1 - thresholds).astype(np.int16), rising, falling)
    far = np.full((1, channels), reach)
    sums = np.concatenate([thresholds - 1, thresholds, steps.rising, steps.falling - 1, -far, far]).clip(-reach, reach)
    return found if np.array_equal(found(sums), steps(sums)) else "thresholds in no order"


def packed(table: Comparisons, columns: np.ndarray) -> np.ndarray:
    """What the kernels read of columns, 32 of them after the other, uint8 [columns * column_bytes].

    int16 [R + F, 4, 4, 2] of 32 columns: a threshold after the other, of each what a lane of a quad reads as 16 bytes, for its
    two columns of every eight.

    Args:
        table: of the columns.
        columns: the column of each place; where there is none, anything may be.
    """
    missing = int(columns.max()) + 1 - table.add.shape[1]
    add = np.pad(table.add, ((0, 0), (0, missing)))[:, columns]
    lanes = add.reshape(len(add), -1, _TOGETHER, 4, 2).transpose(
        1, 0, 3, 2, 4
    )  # [32 columns, threshold, lane, fragment, column]
    return np.ascontiguousarray(lanes).view(np.uint8).reshape(-1)


def slots(width: int, columns: int) -> np.ndarray:
    """The column of each place in a product whose columns are permuted, int64 [columns].

    As `qvit.engines.cuda.step_tables.slots` for planes of bits, in the order in which ``src/epilogue_compare.cuh`` joins bits:
    two neighbours of the product are in the halves of a register, and the two groups of its fragments take turns.
    """
    place = np.arange(columns)
    fragment, lane, second = place % width // 8, place % 8 // 2, place % 2
    half = width // 16  # fragments of a group
    own = width // 8 * second + 2 * (fragment % half) + fragment // half
    return place - place % width + lane * (width // 4) + own
