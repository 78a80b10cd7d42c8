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


def bit_chunks(columns: int) -> int:
    """Tiles that a row of ``columns`` two-bit codes has as planes of bits."""
    return chunks(pad(columns, 256) // 4)


def planes(codes: torch.Tensor) -> torch.Tensor:
    """Two-bit codes, uint8 or int8 [rows, columns] -> uint8 [rows, bytes], planes of bits padded with zeros to whole tiles."""
    rows, columns = codes.shape
    whole = torch.zeros(rows, bit_chunks(columns) * 512, dtype=torch.uint8, device=codes.device)
    whole[:, :columns] = codes.view(torch.uint8) & 3
    groups = whole.reshape(rows, -1, 32, 8)  # [rows, 256 columns, byte, bit]
    weights = 1 << torch.arange(8, device=codes.device)
    high, low = (((groups >> plane & 1) * weights).sum(-1) for plane in (1, 0))
    return torch.stack([high, low], dim=2).reshape(rows, -1).to(torch.uint8)


def from_planes(memory: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `planes`: uint8 [rows, columns]."""
    groups = memory.reshape(len(memory), -1, 2, 32, 1) >> torch.arange(8, device=memory.device) & 1
    codes = 2 * groups[:, :, 0] + groups[:, :, 1]
    return codes.reshape(len(memory), -1)[:, :columns].to(torch.uint8)


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
