"""What the CUDA kernels read of Swin's windows and maps: the bias of positions, regions, and which row lies where."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from qvit.engines.cuda.constants import Constants
from qvit.engines.cuda.layout import pad
from qvit.integer.ops import Windows

_BANKS = 8  # floats between rows of the bias beyond a multiple of 32, so that eight rows lie in different banks
_MOST_HELD = 64  # tokens up to which a block keeps the bias of its head


@dataclass(frozen=True, eq=False)
class WindowConstants:
    """A block's windows on the device.

    Attributes:
        bias: float32 [H, N, N padded], ``bias_line(N)`` floats a row, minus infinity behind the last key.
        regions: int8 [W, N padded] where windows are shifted, else ``None``; see `Windows.regions`.
    """

    bias: torch.Tensor
    regions: torch.Tensor | None

    @classmethod
    def of(cls, windows: Windows, to: Constants) -> WindowConstants:
        """The constants of a block's windows."""
        heads, n = windows.bias_table.shape[1], windows.area
        bias = np.full((heads, n, bias_line(n)), -np.inf, np.float32)
        bias[:, :, :n] = windows.bias()
        regions = windows.regions()
        if regions is not None:
            regions = np.pad(regions, ((0, 0), (0, pad(n, 32) - n)))
        return cls(to.array(bias), None if regions is None else to.array(regions))


def bias_line(tokens: int) -> int:
    """Floats from one row of the bias to the next, as in ``src/attention_head.cuh``."""
    return pad(tokens, 32) + _BANKS


def bias_bytes(tokens: int) -> int:
    """Bytes of shared memory for the bias of one head; 0 where it stays where it is."""
    return 4 * tokens * bias_line(tokens) if tokens <= _MOST_HELD else 0


def window_rows(windows: Windows, batch: int) -> np.ndarray:
    """int32 [batch * L]: row of the residual stream of every row in the order of windows."""
    return _of_batch(windows.tokens().reshape(-1), windows.map[0] * windows.map[1], batch)


def square_rows(map_size: tuple[int, int], batch: int) -> np.ndarray:
    """int32 [batch * L / 4 * 4]: the four rows that patch merging joins, column by column of each 2 x 2 square."""
    rows, columns = map_size
    tokens = np.arange(rows * columns, dtype=np.int32).reshape(rows // 2, 2, columns // 2, 2)
    return _of_batch(tokens.transpose(0, 2, 3, 1).reshape(-1), rows * columns, batch)


def _of_batch(tokens: np.ndarray, tokens_of_image: int, batch: int) -> np.ndarray:
    first = tokens_of_image * np.arange(batch, dtype=np.int32)[:, None]
    return (first + tokens).reshape(-1)
