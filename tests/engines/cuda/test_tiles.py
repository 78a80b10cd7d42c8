"""Tiles fit a multiprocessor and leave none without work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qvit.engines.cuda.tiles import (
    MOST_SHARED,
    HopperTile,
    MmaTile,
    choose,
    choose_bits,
    choose_floats,
    choose_norm_behind,
    choose_whole_rows,
    with_columns,
    with_nibbles,
)

MULTIPROCESSORS = 132
WIDTHS = (192, 384, 768)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("batch", [1, 4, 64, 256])
def test_every_product_of_deit(width: int, batch: int) -> None:
    rows = 197 * batch
    for n, k in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (1000, width)):
        for hopper in (False, True):
            tile = choose(rows, n, k, MULTIPROCESSORS, hopper)
            assert tile.shared(k) <= MOST_SHARED
            assert tile.threads() <= 1024
            assert isinstance(tile, MmaTile) or hopper
        found = [choose_bits(rows, n, k, MULTIPROCESSORS)]
        for bits in (False, True):
            found += [choose(rows, n, k, MULTIPROCESSORS, bits) for choose in (choose_floats, choose_whole_rows)]
        for special in found:
            assert special is None or (special.shared(k) <= MOST_SHARED and special.tiles(rows, n) >= 0.95 * MULTIPROCESSORS)


def test_large_products_take_hoppers_way_and_small_ones_many_blocks() -> None:
    assert isinstance(choose(256 * 197, 1152, 384, MULTIPROCESSORS, hopper=True), HopperTile)
    assert choose(256 * 197, 1152, 384, MULTIPROCESSORS, hopper=False) == MmaTile(128, 128, 64, 4, 2, 2)
    assert isinstance(choose(197, 1152, 384, MULTIPROCESSORS, hopper=True), MmaTile)
    assert choose_bits(256 * 197, 768, 3072, MULTIPROCESSORS) == HopperTile(2, 64, 2, bits=True)
    assert choose_bits(256 * 197, 1536, 384, MULTIPROCESSORS) == HopperTile(4, 128, 2, bits=True, twice=True)
    assert choose_bits(197, 1152, 384, MULTIPROCESSORS) is None
    assert choose_whole_rows(256 * 197, 384, 384, MULTIPROCESSORS, bits=False) is not None
    assert choose_whole_rows(256 * 197, 768, 768, MULTIPROCESSORS, bits=False) is None
    for bits in (False, True):  # LayerNorm follows where rows are narrow
        whole = choose_whole_rows(256 * 197, 192, 192, MULTIPROCESSORS, bits)
        assert whole is not None
        assert choose_norm_behind(256 * 197, 192, 192, MULTIPROCESSORS, bits) == whole
        assert choose_norm_behind(256 * 197, 384, 384, MULTIPROCESSORS, bits) is None
    for k in (384, 1536):  # two-bit weights of all of a DeiT-S layer stay in shared memory
        planes = choose_whole_rows(256 * 197, 384, k, MULTIPROCESSORS, bits=True)
        assert planes is not None
        assert planes.defines(k)["B_STAYS"] == 1
    for k, stays in ((384, 1), (1536, 0)):  # so do all of a layer's bytes where k is short
        tile = choose_whole_rows(256 * 197, 384, k, MULTIPROCESSORS, bits=False)
        assert tile is not None
        assert (tile.defines(k)["B_STAYS"], tile.defines(k)["DIRECT"]) == (stays, 1)
        floats = choose_floats(256 * 197, 384, k, MULTIPROCESSORS, bits=False)
        assert floats is not None
        assert (floats.bn, floats.overlaps) == (192, True)  # the floats of one tile are added up while the next is multiplied
    # 131 blocks are as good as 132.
    assert choose_whole_rows(85 * 197, 384, 1536, MULTIPROCESSORS, bits=False) == tile
    assert choose_floats(256 * 197, 1001, 384, MULTIPROCESSORS, bits=False) is None  # rows do not begin at 16 bytes
    assert choose_floats(256 * 197, 384, 1536, MULTIPROCESSORS, bits=False) is not None


def test_float16_comes_and_goes_in_longer_pieces() -> None:
    for bits, k, piece in ((False, 384, 64), (False, 1536, 32), (True, 384, 64), (True, 1536, 64)):
        tile = choose_floats(256 * 197, 384, k, MULTIPROCESSORS, bits, half=True)
        assert tile is not None
        assert tile.piece == piece
        assert choose_floats(256 * 197, 384, k, MULTIPROCESSORS, bits).piece == 32  # type: ignore[union-attr]
    wide = choose_floats(256 * 197, 768, 3072, MULTIPROCESSORS, bits=False, half=True)
    assert wide is not None
    assert (wide.bn, wide.stages, wide.keeps_rows) == (128, 5, False)
    assert choose_floats(256 * 197, 1004, 384, MULTIPROCESSORS, bits=False, half=True) is None  # not at 16 bytes
    assert choose_floats(256 * 197, 1004, 384, MULTIPROCESSORS, bits=False) is not None


@pytest.mark.parametrize("half", [False, True])
def test_planes_of_long_rows_are_held_in_registers(half: bool) -> None:
    """Their floats go through shared memory, which two buffers of all of k leave little room in."""
    tile = choose_floats(256 * 197, 768, 3072, MULTIPROCESSORS, bits=True, half=half)
    assert tile is not None
    assert tile.holds
    assert tile.overlaps
    assert tile.piece == 32


def test_what_is_made_twice_of_rows_in_registers_has_whole_buffers() -> None:
    """Weights of floats do not lie twice behind them (`REST`)."""
    held = 0
    for k in range(64, 3136, 64):
        tile = choose_floats(256 * 197, 384, k, MULTIPROCESSORS, bits=True, half=True)
        held += tile is not None and tile.holds
        assert tile is None or not tile.defines(k)["REST"]
    assert held


def test_codes_two_a_byte_take_half_the_buffers() -> None:
    for n, k, rows in ((192, 768, 256 * 197), (384, 1536, 256 * 197), (768, 3072, 256 * 197), (128, 512, 64 * 197)):
        for tile in (
            choose_floats(rows, n, k, MULTIPROCESSORS, bits=False),
            choose_whole_rows(rows, n, k, MULTIPROCESSORS, False),
        ):
            packed = with_nibbles(tile, k)
            if packed is None:
                assert tile is None or n == 384  # whole rows of more columns than an instruction has
                continue
            assert isinstance(tile, HopperTile)
            assert packed.shared(k) <= min(tile.shared(k), MOST_SHARED)
            assert packed.defines(k)["A_NIBBLES"] == 1
            assert packed.defines(k)["B_STAYS"] == tile.defines(k)["B_STAYS"]
    assert HopperTile(2, 128, 4, nibbles=True).defines(1536)["RESIDENT"] == 1  # six tiles of 256 columns
    wide = HopperTile(3, 128, 4, piece=32, slots=2)
    assert with_nibbles(wide, 1280) == HopperTile(3, 128, 4, piece=32, slots=2, nibbles=True, keeps_rows=False)
    wide = HopperTile(2, 192, 4, row_stages=4, piece=32, slots=3, overlaps=True, keeps_rows=False)
    staying = replace(wide, stages=3, slots=2, keeps_rows=True)
    for tile, k, resident in ((wide, 1536, 0), (staying, 1536, 1), (staying, 3072, 0)):
        packed = with_nibbles(tile, k)
        assert packed is not None
        assert (packed.row_stages, packed.defines(k)["RESIDENT"]) == (3, resident)
        assert packed.shared(k) <= MOST_SHARED
    none = (HopperTile(2, 128, 4, bits=True), HopperTile(2, 384, 5, direct=True), MmaTile(64, 64, 64, 4, 4, 1), None)
    assert [with_nibbles(tile, 1536) for tile in none] == [None] * 4
    assert with_nibbles(HopperTile(2, 128, 4), 640) is None


def test_rows_stay_where_k_is_short() -> None:
    tile = HopperTile(2, 128, 4)
    assert [tile.defines(k)["RESIDENT"] for k in (192, 768, 1536)] == [1, 1, 0]
    planes = HopperTile(2, 128, 4, bits=True)
    assert planes.defines(1536) | {"BITS": 1, "DEPTH": 384, "RESIDENT": 1} == planes.defines(1536)
    assert planes.defines(384)["DEPTH"] == 128  # two groups of 256 columns, 64 bytes each


def test_the_rest_of_k_where_registers_hold_rows_of_bits() -> None:
    held = HopperTile(2, 128, 4, bits=True, twice=True, holds=True)
    assert [held.defines(k)["REST"] for k in (192, 288, 384, 512)] == [0, 1, 1, 0]
    for other in (replace(held, bits=False), replace(held, twice=False), replace(held, holds=False)):
        assert other.defines(384)["REST"] == 0


def test_room_for_what_is_known_of_columns() -> None:
    small, large = HopperTile(3, 128, 4), HopperTile(3, 128, 6)
    for tile, stages in ((small, 2), (large, 1), (HopperTile(2, 128, 10), 0)):
        wider = with_columns(tile, 384, 280)
        assert wider.defines(384)["COLUMN_STAGES"] == stages
        assert wider.shared(384) <= MOST_SHARED
    mma = MmaTile(64, 64, 64, 4, 4, 1)
    assert with_columns(mma, 384, 280) == mma
