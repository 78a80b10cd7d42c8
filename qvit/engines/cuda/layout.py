"""How codes lie in memory; see ``src/layout.cuh``."""

from __future__ import annotations

import torch

TILE_ROWS, CHUNK = 64, 128
NIBBLE_CHUNK = 2 * CHUNK  # columns of a tile of codes that lie two a byte
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


def has_rest(columns: int) -> bool:
    """Whether behind whole 256 columns of planes there are some, and at most half as many."""
    return 0 < columns % 256 <= 128


def rest_twice(memory: torch.Tensor, columns: int) -> torch.Tensor:
    """`planes` of rows with such a rest -> the same with the rest's columns a second time, 128 behind themselves."""
    out, at = memory.clone(), columns // 256 * 64
    for plane in (at, at + 32):
        out[:, plane + 16 : plane + 32] = out[:, plane : plane + 16]
    return out


def nibble_chunks(columns: int) -> int:
    """Tiles that a row of ``columns`` codes has, a multiple of 256, two a byte."""
    return columns // NIBBLE_CHUNK


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes from 0 to 15, uint8 [rows, columns] -> uint8 [rows, columns / 2]; of eight neighbours four bytes."""
    groups = codes.reshape(len(codes), -1, 2, 4)
    return (groups[:, :, 0] | groups[:, :, 1] << 4).reshape(len(codes), -1)


def from_nibbles(memory: torch.Tensor) -> torch.Tensor:
    """The inverse of `nibbles`."""
    bytes_ = memory.reshape(len(memory), -1, 1, 4)
    return torch.cat([bytes_ & 15, bytes_ >> 4], dim=2).reshape(len(memory), -1)


def nibble_order(columns: int) -> torch.Tensor:
    """The column at each place of k that a product has of codes two a byte, int64 [columns].

    Of 256 columns a lane of four has 64 neighbours in 32 bytes (``src/hopper_products.cuh``). Of every 32 places of k it holds
    four and, 16 further, four more: the halves of one word of its codes.
    """
    place = torch.arange(columns)
    step, half, lane = place % 256 // 32, place % 32 // 16, place % 16 // 4
    return place - place % 256 + 64 * lane + 8 * step + 4 * half + place % 4


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
