"""How products are cut into tiles, and which kernel multiplies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from qvit.engines.cuda.layout import CHUNK, TILE_ROWS, bit_chunks, chunks, pad

_MOST_SHARED = 227 * 1024  # bytes of shared memory a block may have on Hopper
_RESIDENT = 6  # tiles of k up to which a block keeps its rows


class Tile(Protocol):
    """How one product [M, K] x [K, N] is computed."""

    kernel: ClassVar[str]

    def defines(self, k: int) -> dict[str, int]:
        """Constants in the source."""
        ...

    def blocks(self, m: int, n: int, multiprocessors: int) -> int:
        """Blocks that are launched."""
        ...

    def threads(self) -> int:
        """Of a block."""
        ...

    def shared(self, k: int) -> int:
        """Bytes of shared memory of a block."""
        ...


@dataclass(frozen=True)
class MmaTile:
    """``src/gemm.cu``.

    Attributes:
        bm, bn: sums [bm, bn] that a block computes.
        bk: bytes of k that come at a time: 32, 64 or 128.
        stages: buffers of such bytes.
        warps_m, warps_n: of the block; each has a part [bm / warps_m, bn / warps_n].
    """

    bm: int
    bn: int
    bk: int
    stages: int
    warps_m: int
    warps_n: int

    kernel: ClassVar[str] = "gemm"

    def threads(self) -> int:
        """See `Tile`."""
        return 32 * self.warps_m * self.warps_n

    def shared(self, k: int) -> int:
        """The buffers, or the codes on their way out."""
        lines = self.warps_n * self.bm * (self.bn // self.warps_n + 16)
        return max(self.stages * (self.bm + self.bn) * self.bk, lines)

    def defines(self, k: int) -> dict[str, int]:
        """See `Tile`."""
        return {
            "kBM": self.bm,
            "kBN": self.bn,
            "kBK": self.bk,
            "kStages": self.stages,
            "kWarpsM": self.warps_m,
            "kWarpsN": self.warps_n,
        }

    def tiles(self, m: int, n: int) -> int:
        """Of a product [m, n]."""
        return -(-m // self.bm) * -(-n // self.bn)

    def blocks(self, m: int, n: int, multiprocessors: int) -> int:
        """One a tile."""
        return self.tiles(m, n)


@dataclass(frozen=True)
class HopperTile:
    """``src/gemm_hopper.cu``.

    Attributes:
        groups: warpgroups of a block, each with 64 rows.
        bn: columns at a time: 64, 128, 192 or 384.
        stages: buffers for tiles of 128 bytes of k, or for tiles of all of k where products are of bits.
        whole_rows: ``bn`` is the width of a row, and its LayerNorm follows.
        bits: one-bit products of the planes of two-bit codes.
        prefetch: whole rows' residual comes into the L2 cache while a tile is multiplied.
    """

    groups: int
    bn: int
    stages: int
    whole_rows: bool = False
    bits: bool = False
    prefetch: bool = True

    kernel: ClassVar[str] = "gemm_hopper"

    def threads(self) -> int:
        """A warpgroup that copies, beside the others."""
        return 128 * (self.groups + 1)

    def _chunks(self, k: int) -> int:
        return bit_chunks(k) if self.bits else chunks(k)

    def _resident(self, k: int) -> bool:
        return self._chunks(k) <= _RESIDENT

    def shared(self, k: int) -> int:
        """Rows that are kept, buffers, codes on their way out, barriers."""
        rows = TILE_ROWS * self.groups * CHUNK
        held, stage = (self._chunks(k) * rows, 0) if self._resident(k) else (0, rows)
        stage += (self._chunks(k) if self.bits else 1) * self.bn * CHUNK
        out = self.bn if not self.whole_rows or self.bn <= 128 else 128 if self.bn % 128 == 0 else 64
        lines = 4 * self.groups * 16 * (out + 16)
        barriers = 8 * (2 * self.stages + _RESIDENT + 1)
        return held + self.stages * stage + lines + barriers

    def defines(self, k: int) -> dict[str, int]:
        """See `Tile`."""
        return {
            "kGroups": self.groups,
            "kBN": self.bn,
            "kStages": self.stages,
            "DEPTH": pad(k, 256) // 4 if self.bits else k,
            "RESIDENT": int(self._resident(k)),
            "BITS": int(self.bits),
            "PREFETCH": int(self.prefetch),
        }

    def tiles(self, m: int, n: int) -> int:
        """Of a product [m, n]."""
        return -(-m // (TILE_ROWS * self.groups)) * -(-n // self.bn)

    def blocks(self, m: int, n: int, multiprocessors: int) -> int:
        """One a multiprocessor, each with a range of tiles."""
        return min(multiprocessors, self.tiles(m, n))

    def suits(self, m: int, n: int, k: int, multiprocessors: int) -> bool:
        """Whether there is work for all multiprocessors, and a block's shared memory holds its part."""
        fits = self.shared(k) <= _MOST_SHARED and (self._resident(k) or not self.bits)
        return fits and self.tiles(m, n) >= multiprocessors


_MMA = (MmaTile(128, 128, 64, 4, 2, 2), MmaTile(64, 64, 64, 4, 4, 1), MmaTile(32, 64, 64, 4, 2, 1))
_HOPPER = tuple(HopperTile(*sizes) for sizes in ((3, 128, 4), (3, 128, 3), (2, 128, 4), (2, 64, 4)))
_BITS = tuple(HopperTile(*sizes, bits=True) for sizes in ((3, 128, 4), (3, 128, 2), (2, 128, 3), (2, 128, 2), (2, 64, 2)))
# Widths of rows that a warpgroup's registers hold, for LayerNorm behind a product.
_WHOLE_ROWS = (64, 128, 192, 384)


def choose(m: int, n: int, k: int, multiprocessors: int, hopper: bool) -> Tile:
    """The largest tile for bytes that leaves no multiprocessor without work.

    Args:
        m, n, k: the product [m, k] x [k, n].
        multiprocessors: of the GPU.
        hopper: whether it has warpgroup products (compute capability 9).
    """
    if hopper:
        for tile in _HOPPER:
            if tile.suits(m, n, k, multiprocessors):
                return tile
    for mma in _MMA[:-1]:
        if mma.tiles(m, n) >= multiprocessors:
            return mma
    return _MMA[-1]


def choose_bits(m: int, n: int, k: int, multiprocessors: int) -> HopperTile | None:
    """A tile for planes of two-bit codes, on Hopper; ``None`` where there is none, or too little work."""
    return next((tile for tile in _BITS if tile.suits(m, n, k, multiprocessors)), None)


def choose_whole_rows(m: int, n: int, k: int, multiprocessors: int, bits: bool) -> HopperTile | None:
    """A tile that is followed by LayerNorm, on Hopper; ``None`` where there is none, or too little work."""
    if n not in _WHOLE_ROWS:
        return None
    tile = HopperTile(2, n, 3, whole_rows=True, bits=bits)
    return tile if tile.suits(m, n, k, multiprocessors) else None
