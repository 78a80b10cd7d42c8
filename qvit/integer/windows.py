"""The geometry of Swin's windows: which tokens a window holds, which pairs of them attend, how far apart they are.

All of it follows from three pairs (height, width), so no file holds it.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

MASKED = np.float32(-100.0)

Pair = tuple[int, int]


def _split(values: np.ndarray, window: Pair) -> np.ndarray:
    """A map [rows, columns] -> its windows, row by row, [W, N]."""
    (rows, columns), (height, width) = values.shape, window
    return values.reshape(rows // height, height, columns // width, width).swapaxes(1, 2).reshape(-1, height * width)


@lru_cache(maxsize=16)
def window_tokens(map_size: Pair, window: Pair, shift: Pair) -> np.ndarray:
    """int32 [W, N]: position in the map (row by row) of every token of every window.

    The map is rolled up and left by the shift before it is cut, so that the last windows hold tokens of opposite borders.
    """
    tokens = np.arange(map_size[0] * map_size[1], dtype=np.int32).reshape(map_size)
    return _constant(_split(np.roll(tokens, (-shift[0], -shift[1]), axis=(0, 1)), window))


@lru_cache(maxsize=16)
def window_regions(map_size: Pair, window: Pair, shift: Pair) -> np.ndarray:
    """int8 [W, N]: which part of the map each token of each window is from, 0 to 3.

    Two tokens of a window were no neighbours before the map was rolled where their parts differ.
    """
    # Only the windows that the seam cuts are split: whole windows end where the rolled map's last ones begin.
    down, right = (
        np.arange(side) >= side - by if by else np.zeros(side, bool) for side, by in zip(map_size, shift, strict=True)
    )
    return _constant(_split(2 * down[:, None].astype(np.int8) + right[None, :], window))


@lru_cache(maxsize=16)
def window_mask(map_size: Pair, window: Pair, shift: Pair) -> np.ndarray | None:
    """float32 [W, N, N]: -100 where two tokens of a window were no neighbours before the map was rolled, else 0.

    ``None`` where the windows are not shifted. Equal arguments give the same array.
    """
    if not any(shift):
        return None
    region = window_regions(map_size, window, shift)
    return _constant(np.where(region[:, :, None] != region[:, None, :], MASKED, np.float32(0)))


@lru_cache(maxsize=16)
def relative_index(window: Pair) -> np.ndarray:
    """int32 [N, N]: row of the table of relative positions that belongs to a query n and a key m of a window.

    The table has ``(2 height - 1) (2 width - 1)`` rows: for each vertical distance, query minus key from ``1 - height`` on, all
    horizontal ones from ``1 - width`` on.
    """
    height, width = window
    row, column = (part.reshape(-1) for part in np.mgrid[:height, :width])
    vertical = row[:, None] - row[None, :] + height - 1
    horizontal = column[:, None] - column[None, :] + width - 1
    return _constant((vertical * (2 * width - 1) + horizontal).astype(np.int32))


def _constant(array: np.ndarray) -> np.ndarray:
    """Shared by all callers, so nobody may write to it."""
    array.setflags(write=False)
    return array
