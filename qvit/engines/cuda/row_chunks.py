"""Rows in chunks that stay in the L2 cache from one launch to the next.

From proj to the next block's first norm every row is computed by itself. Over all rows of a large batch each launch goes
through memory; over one chunk of them after another, a launch finds in the cache what the one before it wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qvit.engines.cuda.layout import CHUNK

_UNIT = 128  # rows: whole tiles of codes, and those of most products


@dataclass(frozen=True)
class Rows:
    """``count`` rows from row ``first`` on, a multiple of 64."""

    first: int
    count: int

    def floats(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of x [rows, C]."""
        return x[self.first : self.first + self.count]

    def codes(self, memory: torch.Tensor, chunks: int) -> torch.Tensor:
        """Codes from the first of these rows on, as they lie in memory; a row has so many tiles."""
        return memory.reshape(-1)[self.first * chunks * CHUNK :]


def chunk_rows(width: int, one_bit: bool, hopper: bool, multiprocessors: int) -> int:
    """Rows of a chunk; 0 for all rows at once.

    A chunk has a tile for each multiprocessor, so that none is without work. One-bit products read and write too little for
    the cache to be worth more launches: on an H100 DeiT-S at batch 256 lost 0.04 of 5.27 ms, where int8 products won 0.22 of
    6.23 (chunks of 64 rows for each multiprocessor lost 0.20, of 192 won 0.12).

    Args:
        width: channels of a row.
        one_bit: whether the products of a block are one-bit products.
        hopper: whether the GPU has Hopper's own products, whose tiles have 128 rows.
        multiprocessors: of the GPU.
    """
    return _UNIT * multiprocessors if hopper and not one_bit else 0


def row_chunks(rows: int, size: int) -> list[Rows]:
    """All rows in chunks of ``size`` (0: all rows); the last also has a rest of less than half a chunk, too few for a GPU."""
    if not size:
        return [Rows(0, rows)]
    count = max(1, (rows + size // 2) // size)
    return [Rows(i * size, size if i + 1 < count else rows - i * size) for i in range(count)]
