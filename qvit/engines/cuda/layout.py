"""How codes lie in memory; see ``src/layout.cuh``."""

from __future__ import annotations

import torch

TILE_ROWS, CHUNK = 64, 128
_PIECES = torch.arange(8) ^ torch.arange(TILE_ROWS)[:, None] % 8  # [line, place] -> piece, and the other way round


def pad(n: int, to: int) -> int:
    """``n`` up to the next multiple."""
    return (n + to - 1) // to * to


def chunks(columns: int) -> int:
    """Tiles that a row of ``columns`` codes has."""
    return pad(columns, CHUNK) // CHUNK


def tiled(codes: torch.Tensor) -> torch.Tensor:
    """uint8 or int8 [rows, columns], multiples of a tile -> the same as it lies in memory."""
    rows, columns = codes.shape
    lines = codes.reshape(rows // TILE_ROWS, TILE_ROWS, columns // CHUNK, 8, 16).transpose(1, 2)
    return _permuted(lines).reshape(rows, columns)


def untiled(memory: torch.Tensor) -> torch.Tensor:
    """The inverse of `tiled`."""
    rows, columns = memory.shape
    lines = memory.reshape(rows // TILE_ROWS, columns // CHUNK, TILE_ROWS, 8, 16)
    return _permuted(lines).transpose(1, 2).reshape(rows, columns)


def _permuted(lines: torch.Tensor) -> torch.Tensor:
    index = _PIECES.to(lines.device)[None, None, :, :, None].expand(lines.shape)
    return lines.gather(3, index)
