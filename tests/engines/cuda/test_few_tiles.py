"""Tiles of products of few rows."""

from __future__ import annotations

import pytest

from qvit.engines.cuda.few_tiles import MOST_SHARED, FewTile, choose_few

MULTIPROCESSORS = 132
WIDTHS = (192, 384, 768)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 17, 197, 394])
@pytest.mark.parametrize("multiprocessors", [46, 108, MULTIPROCESSORS])
def test_few_rows(width: int, rows: int, multiprocessors: int) -> None:
    """Tiles are cut evenly, fit the registers and cover all of k; one image of DeiT-S keeps most multiprocessors busy."""
    for n, k, part in (
        (3 * width, width, 64),
        (width, width, 8),
        (4 * width, width, 16),
        (width, 4 * width, 8),
        (1000, width, 8),
    ):
        tile = choose_few(rows, n, k, part, multiprocessors)
        if rows * n > 6144 * multiprocessors:
            assert tile is None
            continue
        assert isinstance(tile, FewTile)
        columns = tile.bn // tile.warps_n
        assert (tile.bm % 16, tile.bn % tile.warps_n, columns % 8, tile.bn % tile.part, tile.part % part) == (0, 0, 0, 0, 0)
        assert tile.units * (tile.bm // 8 + columns // 8) <= 24
        assert tile.threads() <= 512
        spread = [tile.with_spread(20 * tile.bn), tile.with_spread(tile.beside_floats(3, 1))]
        spread += [tile.with_spread(264 * tile.bn)] if part == 16 else []
        assert all(one.shared(k) <= MOST_SHARED for one in spread)
        defines = tile.defines(k)
        covered, needed = tile.split * tile.units * defines["kRounds"], -(-k // 64)
        assert needed <= covered < needed + tile.split * tile.units
        assert defines["kEven"] == (covered == needed)
        assert -(-n // tile.bn) * tile.bn <= -(-n // 256) * 256  # constants are there for all columns
        if (width, rows, multiprocessors) == (384, 197, MULTIPROCESSORS):
            assert 100 <= tile.blocks(rows, n, multiprocessors) <= MULTIPROCESSORS
            assert defines["kRounds"] == 1
