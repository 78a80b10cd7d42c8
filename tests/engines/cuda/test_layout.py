"""Where codes lie, written out place by place as ``src/layout.cuh`` has it."""

from __future__ import annotations

import pytest
import torch

from qvit.engines.cuda.layout import (
    CHUNK,
    TILE_ROWS,
    bit_chunks,
    chunks,
    from_nibbles,
    from_planes,
    has_rest,
    nibble_chunks,
    nibble_order,
    nibbles,
    planes,
    rest_twice,
    tiled,
    untiled,
)


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


@pytest.mark.parametrize("columns", [32, 128, 384])
def test_the_rest_of_planes_twice(columns: int) -> None:
    """Columns behind whole 256 lie 128 further once more; nothing else changes."""
    codes = torch.randint(0, 4, (5, columns), dtype=torch.uint8)
    wanted = torch.zeros(5, bit_chunks(columns) * 512, dtype=torch.uint8)
    wanted[:, :columns] = codes
    whole = columns // 256 * 256
    wanted[:, whole + 128 : columns + 128] = codes[:, whole:]
    before = planes(codes)
    kept = before.clone()
    assert torch.equal(from_planes(rest_twice(before, columns), wanted.shape[1]), wanted)
    assert torch.equal(before, kept)
    assert [has_rest(n) for n in (32, 128, 160, 256, 288, 384, 416, 768)] == [
        True,
        True,
        False,
        False,
        True,
        True,
        False,
        False,
    ]


def test_nibbles() -> None:
    codes = torch.randint(0, 16, (3, 512), dtype=torch.uint8)
    memory = nibbles(codes)
    assert memory.shape == (3, nibble_chunks(512) * CHUNK)
    for column in (0, 3, 4, 7, 8, 255, 256, 510):
        byte = column // 8 * 4 + column % 4
        assert torch.equal(memory[:, byte] >> (4 if column % 8 >= 4 else 0) & 15, codes[:, column])
    assert torch.equal(from_nibbles(memory), codes)


def test_k_of_weights_is_in_the_order_in_which_a_lane_unpacks_codes() -> None:
    order = nibble_order(512)
    assert torch.equal(order.sort().values, torch.arange(512))
    words = nibbles(torch.arange(512).remainder(16).to(torch.uint8)[None]).view(torch.int32)[0]
    for block in (0, 256):
        for lane in range(4):
            for step in range(8):
                word = (block + 64 * lane + 8 * step) // 8
                for half in (0, 1):  # of the 32 places of a step, fragments have four from 4 lane and 16 + 4 lane on
                    places = block + 32 * step + 16 * half + 4 * lane + torch.arange(4)
                    unpacked = (words[word] >> (4 * half) & 0x0F0F0F0F).reshape(1).view(torch.uint8)
                    assert torch.equal(order[places] % 16, unpacked.long())
                    assert (order[places] // 8 == word).all()


def test_tiles_of_a_row() -> None:
    assert [chunks(n) for n in (1, 128, 129, 384)] == [1, 1, 2, 3]
    assert [bit_chunks(n) for n in (32, 256, 384, 513, 1536)] == [1, 1, 1, 2, 3]
