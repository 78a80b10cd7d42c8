"""Where codes lie, written out place by place as ``src/layout.cuh`` has it."""

from __future__ import annotations

import pytest
import torch

from qvit.engines.cuda.layout import CHUNK, TILE_ROWS, bit_chunks, chunks, from_planes, planes, tiled, untiled


def _code_at(row: int, column: int, columns: int) -> int:
    tile = row // 64 * (columns // 128) + column // 128
    return tile * 8192 + row % 64 * 128 + ((column % 128 // 16) ^ (row % 8)) * 16 + column % 16


def test_tiles() -> None:
    codes = torch.randint(0, 256, (2 * TILE_ROWS, 3 * CHUNK), dtype=torch.uint8)
    memory = tiled(codes)
    flat = memory.reshape(-1)
    for row in (0, 1, 7, 8, 63, 64, 127):
        for column in (0, 15, 16, 127, 128, 300, 383):
            assert flat[_code_at(row, column, 3 * CHUNK)] == codes[row, column]
    assert torch.equal(untiled(memory), codes)


@pytest.mark.parametrize("columns", [32, 96, 256, 384, 520])
def test_planes(columns: int) -> None:
    codes = torch.randint(0, 4, (5, columns), dtype=torch.uint8)
    memory = planes(codes)
    assert memory.shape == (5, bit_chunks(columns) * CHUNK)
    for column in {0, 1, 31, columns - 1, columns // 2}:
        for plane in (0, 1):
            byte = column // 256 * 64 + (1 - plane) * 32 + column % 256 // 8
            assert torch.equal(memory[:, byte] >> (column % 8) & 1, codes[:, column] >> plane & 1)
    assert torch.equal(from_planes(memory, columns), codes)
    # Signed codes lie as their two's complement, and what pads a row is zero.
    signed = codes.to(torch.int8) - 2
    assert torch.equal(from_planes(planes(signed), columns), signed.view(torch.uint8) & 3)
    assert from_planes(planes(torch.full_like(codes, 3)), bit_chunks(columns) * 512)[:, columns:].sum() == 0


def test_tiles_of_a_row() -> None:
    assert [chunks(n) for n in (1, 128, 129, 384)] == [1, 1, 2, 3]
    assert [bit_chunks(n) for n in (32, 256, 384, 513, 1536)] == [1, 1, 1, 2, 3]
