"""How products of few rows are cut into tiles: for latency, not for throughput."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from qvit.engines.cuda.layout import pad

_UNIT = 64  # bytes of k of one load
_MOST_PIECES = 24  # of 16 bytes that a lane holds
_LEAST_WARPS, _MOST_WARPS = 6, 16  # of a block
_WIDEST = 40  # columns that a warp multiplies
_ROWS, _COLUMNS = (16, 32), (8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192)
_MOST_SUMS = 6144  # of a multiprocessor: with more, products are bound by throughput
_COLUMN_PAD = 256  # of constants
# Clocks of a multiprocessor a byte that it loads, a multiplication, an element of the epilogue, and one of a LayerNorm.
_CLOCKS = (1 / 64, 1 / 2048, 1 / 2, 1 / 4)
_MOST_NORMED = 1024  # channels of a LayerNorm


@dataclass(frozen=True)
class FewTile:
    """``src/gemm_few.cu``.

    Attributes:
        bm, bn: sums [bm, bn] that a block computes.
        split: shares of k, each of other warps.
        warps_n: parts of the columns, each of other warps.
        units: of 64 bytes of k that a warp loads at once.
        part: columns of a warp's part of the epilogue; it has 16 rows.
        touch: whether what the epilogue reads is brought near beforehand.
        normed: whether a block makes the codes of its rows itself, by their LayerNorm.
    """

    bm: int
    bn: int
    split: int
    warps_n: int
    units: int
    part: int
    touch: bool = True
    normed: bool = False

    kernel: ClassVar[str] = "gemm_few"

    def defines(self, k: int) -> dict[str, int]:
        """See `qvit.engines.cuda.tiles.Tile`."""
        units, at_once = -(-k // _UNIT), self.split * self.units
        return {
            "kRounds": -(-units // at_once),
            "kEven": int(units % at_once == 0),
            "kBM": self.bm,
            "kBN": self.bn,
            "kSplit": self.split,
            "kWarpsN": self.warps_n,
            "kUnits": self.units,
            "kPart": self.part,
            "TOUCH": int(self.touch),
            "NORM": int(self.normed),
            **({"CHANNELS": k} if self.normed else {}),
        }

    def blocks(self, m: int, n: int, multiprocessors: int) -> int:
        """One a tile."""
        return -(-m // self.bm) * -(-n // self.bn)

    def threads(self) -> int:
        """See `qvit.engines.cuda.tiles.Tile`."""
        return 32 * self.split * self.warps_n

    def shared(self, k: int) -> int:
        """The sums of all shares, the codes on their way out, and those of a LayerNorm."""
        codes = self.bm * (pad(k, 128) + 64) if self.normed else 0
        return 4 * self.split * self.bm * self.bn + self.threads() // 32 * 16 * (self.part + 16) + codes

    def clocks(self, m: int, n: int, k: int, multiprocessors: int) -> float:
        """What the busiest multiprocessor takes, roughly; ranks tiles."""
        load, product, element, normed = _CLOCKS
        one = load * (self.bm + self.bn) * k + product * self.bm * self.bn * k + element * self.bm * self.bn
        one += normed * self.bm * k if self.normed else 0
        return -(-self.blocks(m, n, multiprocessors) // multiprocessors) * one


@cache
def choose_few(m: int, n: int, k: int, part: int, multiprocessors: int, normed: bool = False) -> FewTile | None:
    """The tile that takes least; ``None`` where there is work for larger ones.

    Args:
        m, n, k: the product [m, k] x [k, n].
        part: columns that a warp has at least in the epilogue: 8, or more where they belong together.
        multiprocessors: of the GPU.
        normed: whether a LayerNorm's floats come in, and no codes.
    """
    if normed and k > _MOST_NORMED:
        return None
    if m * n > _MOST_SUMS * multiprocessors:
        return None
    tiles = [
        tile
        for bm in _ROWS
        for bn in _COLUMNS
        if bn % part == 0 and pad(n, bn) <= pad(n, _COLUMN_PAD) and (tile := _cut(bm, bn, k, part, normed)) is not None
    ]
    return min(tiles, key=lambda tile: tile.clocks(m, n, k, multiprocessors), default=None)


def _cut(bm: int, bn: int, k: int, part: int, normed: bool) -> FewTile | None:
    """A tile's warps: shares of k that are even and fit the registers at once, else those that come nearest to it."""
    parts_n = next((n for n in range(1, bn // 8 + 1) if bn % (8 * n) == 0 and bn // n <= _WIDEST), None)
    if parts_n is None:
        return None
    units, most = -(-k // _UNIT), _MOST_PIECES // (bm // 8 + bn // parts_n // 8)
    splits = range(1, min(units, _MOST_WARPS // parts_n) + 1)
    if not most or not splits:
        return None

    def rank(split: int) -> tuple[int, ...]:
        """Rounds, warps that are wanting, units that are not there, warps."""
        share = -(-units // split)
        return -(-share // most), max(0, _LEAST_WARPS - split * parts_n), share * split - units, split

    split = min(splits, key=rank)
    rounds = rank(split)[0]
    return FewTile(bm, bn, split, parts_n, -(-units // (split * rounds)), part, normed=normed)
