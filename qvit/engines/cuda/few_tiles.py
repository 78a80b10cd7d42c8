"""How products of few rows are cut into tiles: for latency, not for throughput."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

from qvit.engines.cuda.layout import pad

SPREAD = True  # all threads take part in epilogues, where they know how
_UNIT = 64  # bytes of k of one load
_MOST_PIECES = 24  # of 16 bytes that a lane holds
_LEAST_WARPS, _MOST_WARPS = 6, 16  # of a block
_NORMED_WARPS = 16  # of a block with a LayerNorm: one a row
# Of a thread at most: two kernels' blocks fit a multiprocessor, one of which waits. Long rows take more.
_REGISTERS, _NORMED_REGISTERS, _LONG_REGISTERS = 112, 72, 128
_LONG = 512  # channels of a LayerNorm
_WIDEST = 40  # columns that a warp multiplies
_ROWS, _COLUMNS = (16, 32), (8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192)
_MOST_SUMS = 6144  # of a multiprocessor: with more, products are bound by throughput
_COLUMN_PAD = 256  # of constants
# Clocks of a multiprocessor a byte that it loads, a multiplication, an element of the epilogue, and one of a LayerNorm.
_CLOCKS = (1 / 64, 1 / 2048, 1 / 2, 1 / 4)
_ROUND = 700  # clocks of a round: what it loads is waited for
_MOST_NORMED = 1024  # channels of a LayerNorm
_ALL_REGISTERS = 65536  # of a multiprocessor
MOST_SHARED = 99 * 1024  # bytes of shared memory that a block may have on every GPU
_COLUMN_BYTES, _ADDED_BYTES = 264, 20 * 1024  # beside the sums: of a column's table at most, or what is added and the like


@dataclass(frozen=True)
class FewTile:
    """``src/gemm_few.cu``.

    Attributes:
        bm, bn: sums [bm, bn] that a block computes.
        split: shares of k, each of other warps.
        warps_n: parts of the columns, each of other warps.
        units: of 64 bytes of k that a warp loads at once.
        part: columns of a warp's part of the epilogue, where that is not spread; it has 16 rows.
        warps: of a block; there may be more than multiply.
        normed: whether a block makes the codes of its rows itself, by their LayerNorm.
        spread: whether all threads take part in the epilogue, a few sums each.
        beside: bytes of shared memory that such an epilogue has beside the sums.
        registers: of a thread, at most.
    """

    bm: int
    bn: int
    split: int
    warps_n: int
    units: int
    part: int
    warps: int
    normed: bool = False
    spread: bool = False
    beside: int = 0
    registers: int = _REGISTERS

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
            "kWarps": self.warps,
            "kUnits": self.units,
            "kPart": self.part,
            "kBound": max(self.threads(), min(1024, _ALL_REGISTERS // self.registers // 128 * 128)),
            "NORM": int(self.normed),
            "SPREAD": int(self.spread),
            # Behind a LayerNorm come smaller blocks, of which several would meet on the few multiprocessors where three
            # kernels' blocks find room.
            "EARLY": int(not self.normed),
            "kShared": self.shared(k),
            **({"CHANNELS": k} if self.normed else {}),
        }

    def blocks(self, m: int, n: int, multiprocessors: int) -> int:
        """One a tile."""
        return -(-m // self.bm) * -(-n // self.bn)

    def threads(self) -> int:
        """See `qvit.engines.cuda.tiles.Tile`."""
        return 32 * self.warps

    def shared(self, k: int) -> int:
        """The sums of all shares, what an epilogue has beside them or codes on their way out, and codes of rows with what their
        LayerNorm touches."""
        share = self.split * self.warps_n * self.units * self.bm * _UNIT
        codes = self.bm // 2 * (2 * pad(k, _UNIT) + 16) + 4 * 6 * -(-k // 8) if self.normed else share
        line = pad(self.bn - 8, 32) + 8 if self.spread else self.bn
        return 4 * self.split * self.bm * line + (self.beside if self.spread else self.warps * 16 * (self.part + 16)) + codes

    def with_spread(self, beside: int = 0) -> FewTile:
        """The tile with an epilogue that all threads take part in, ``beside`` bytes beside the sums."""
        return replace(self, spread=True, beside=beside)

    def beside_floats(self, arrays: int, added: int) -> int:
        """Bytes for so many floats a column, and so many that are added to each sum (``src/few_floats.cuh``)."""
        turns = -(-self.bm // (self.threads() // (self.bn // 4)))
        return 4 * arrays * self.bn + 16 * added * turns * self.threads()

    def clocks(self, m: int, n: int, k: int, multiprocessors: int) -> float:
        """What the busiest multiprocessor takes, roughly; ranks tiles."""
        load, product, element, normed = _CLOCKS
        one = load * (self.bm + self.bn) * k + product * self.bm * self.bn * k + element * self.bm * self.bn
        one += normed * self.bm * k if self.normed else 0
        one += _ROUND * self.defines(k)["kRounds"]
        return -(-self.blocks(m, n, multiprocessors) // multiprocessors) * one


@cache
def choose_few(
    m: int, n: int, k: int, part: int, multiprocessors: int, normed: bool = False, most_shared: int = MOST_SHARED
) -> FewTile | None:
    """The tile that takes least; ``None`` where there is work for larger ones.

    Args:
        m, n, k: the product [m, k] x [k, n].
        part: columns that a warp has at least in the epilogue: 8, or more where they belong together.
        multiprocessors: of the GPU.
        normed: whether a LayerNorm's floats come in, and no codes.
        most_shared: bytes of shared memory that a block may have.
    """
    if normed and k > _MOST_NORMED:
        return None
    if m * n > _MOST_SUMS * multiprocessors:
        return None
    tiles = [
        tile
        for bm in _ROWS
        for bn in _COLUMNS
        if bn % part == 0
        and pad(n, bn) <= pad(n, _COLUMN_PAD)
        and (tile := _cut(bm, bn, k, part, normed, most_shared)) is not None
    ]
    return min(tiles, key=lambda tile: tile.clocks(m, n, k, multiprocessors), default=None)


def _cut(bm: int, bn: int, k: int, part: int, normed: bool, most_shared: int) -> FewTile | None:
    """A tile's warps: shares of k that are even and fit the registers at once, else those that come nearest to it."""
    units, least = -(-k // _UNIT), _NORMED_WARPS if normed else _LEAST_WARPS
    beside = bn * _COLUMN_BYTES if part in (16, 32) else _ADDED_BYTES
    registers = _REGISTERS if not normed else _NORMED_REGISTERS if k <= _LONG else _LONG_REGISTERS
    cuts = []
    for parts_n in range(1, min(bn // 8, _MOST_WARPS) + 1):
        most = _MOST_PIECES // (bm // 8 + -(-bn // parts_n) // 8)
        if bn % (8 * parts_n) or bn // parts_n > _WIDEST or not most:
            continue
        for split in range(1, min(units, _MOST_WARPS // parts_n) + 1):
            share = -(-units // split)
            rounds, warps = -(-share // most), split * parts_n
            tile = FewTile(
                bm,
                bn,
                split,
                parts_n,
                -(-units // (split * rounds)),
                part,
                max(warps, _NORMED_WARPS) if normed else warps,
                normed=normed,
                registers=registers,
            )
            # Bytes that shared memory and the first-level cache pass on: sums there and back, and rows.
            passing = 8 * split * bm * bn + parts_n * bm * k
            if tile.with_spread(beside).shared(k) <= most_shared:
                cuts.append(((rounds, max(0, least - warps), share * split - units, passing), tile))
    return min(cuts, key=lambda cut: cut[0])[1] if cuts else None
