"""Rows in chunks that stay in the L2 cache from one launch to the next; an experiment, off by default.

From proj to the next block's first norm every row is computed by itself. Over all rows of a large batch each launch goes
through memory; over one chunk of them after another, a launch finds in the cache what the one before it wrote. With a tile of
128 rows for each multiprocessor, a chunk leaves none without work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qvit.engines.cuda.layout import CHUNK

# Read when a plan is made.
_CHUNK_ROWS = 0  # of a chunk, a multiple of `_UNIT` (16,896 for 132 multiprocessors); 0: all rows at once
_CHUNKED = ("proj", "norm2", "fc1", "fc2", "norm1")  # launches that are made once a chunk; neighbours of them take turns
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


def row_chunks(rows: int) -> list[Rows]:
    """All rows in chunks; the last one also has a rest of less than half a chunk, which would leave most of the GPU idle."""
    size = _CHUNK_ROWS
    assert size % _UNIT == 0, size
    if not size:
        return [Rows(0, rows)]
    count = max(1, (rows + size // 2) // size)
    return [Rows(i * size, size if i + 1 < count else rows - i * size) for i in range(count)]


def is_chunked(launch: str) -> bool:
    """Whether a launch is made once a chunk: ``proj``, ``norm2``, ``fc1``, ``fc2`` or the next block's ``norm1``."""
    return launch in _CHUNKED
