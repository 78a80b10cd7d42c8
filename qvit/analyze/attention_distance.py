"""How far attention reaches over the image, and where the class token looks (Q-ViT, figure 6; Dosovitskiy et al. 2021).

Attention is a map [B, H, N, N] of weights by which queries (rows) take in keys (columns); of its N tokens the first few are
not patches (class, distillation and register tokens), the others are the patches row by row.
"""

from __future__ import annotations

import numpy as np


def patch_distances(grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """Distances between the centres of patches in pixels, float64 [P, P].

    Args:
        grid: (rows, columns) of patches.
        patch: (height, width) of a patch in pixels.
    """
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    y, x = rows * patch[0], columns * patch[1]
    return np.hypot(y[:, None] - y, x[:, None] - x)


class AttentionDistance:
    """Mean attention distance of each head: the distance from a patch to those it looks at, averaged with its weights.

    ``mean over images and patches i of  sum_j a_ij d_ij / sum_j a_ij``, j over patches alone: what goes to the class token
    is at no distance and is left out, as is the class token's own row. A quantized row may hold zeros alone; it looks at
    nothing and is not counted.

    Args:
        distances: in any unit, [P, P] (`patch_distances`).
        prefix: tokens in front of the patches.
        heads: H.

    Attributes:
        skipped: rows of zeros that were not counted.
    """

    def __init__(self, distances: np.ndarray, prefix: int, heads: int) -> None:
        self.distances, self.prefix = distances, prefix
        self._sums, self._rows = np.zeros(heads), np.zeros(heads, np.int64)
        self.skipped = 0

    def add(self, attention: np.ndarray) -> None:
        """Adds maps [B, H, N, N]."""
        weights = attention[:, :, self.prefix :, self.prefix :].astype(np.float64)
        totals = weights.sum(-1)
        reached = np.einsum("bhij,ij->bhi", weights, self.distances)
        counted = totals > 0
        means = np.divide(reached, totals, out=np.zeros_like(reached), where=counted)
        self._sums += means.sum((0, 2))
        self._rows += counted.sum((0, 2))
        self.skipped += int((~counted).sum())

    def result(self) -> np.ndarray:
        """Mean distance of every head, [H]; NaN for a head whose rows are all zeros."""
        return np.divide(self._sums, self._rows, out=np.full_like(self._sums, np.nan), where=self._rows > 0)


def class_token_map(attention: np.ndarray, prefix: int, grid: tuple[int, int]) -> np.ndarray:
    """What the class token (token 0) takes from each patch, the mean of the heads: [B, H, N, N] -> [B, rows, columns]."""
    return attention[:, :, 0, prefix:].mean(1).reshape(-1, *grid)
