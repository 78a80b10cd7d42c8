"""Arrays on their way to a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

COLUMN_PAD = 256  # output channels are padded to a multiple: no tile is wider
_F32 = np.float32


class Constants:
    """Moves arrays to a device, each once.

    Attributes:
        device: where.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def floats(self, values: Any, count: int, padded: int | None = None, fill: float = 0.0) -> torch.Tensor:
        """float32 [padded], ``values`` broadcast to [count] in front."""
        out = np.full(padded or count, fill, _F32)
        out[:count] = np.broadcast_to(np.asarray(values, _F32).reshape(-1), (count,)) if np.size(values) == 1 else values
        return torch.from_numpy(out).to(self.device)

    def array(self, values: np.ndarray) -> torch.Tensor:
        """An array as it is."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def by_channel(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[1], [H, 1, 1] or [H, 1, D] -> float32 [H, D]."""
    return np.ascontiguousarray(np.broadcast_to(values if values.ndim == 1 else values[:, 0, :], shape), _F32)
