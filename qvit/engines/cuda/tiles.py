"""How products are cut into tiles, and which kernel multiplies them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from qvit.engines.cuda.layout import CHUNK, NIBBLE_CHUNK, TILE_ROWS, bit_chunks, chunks, has_rest, nibble_chunks, pad

MOST_SHARED = 227 * 1024  # bytes of shared memory a block may have on Hopper
_RESIDENT = 6  # tiles of k up to which a block keeps its rows
_EVEN = 0.95  # share of multiprocessors that have work that is as good as all


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
            "STAGED": 0,
            "DIRECT": 0,
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
        stages: buffers for b: tiles of 128 bytes of k of as many columns as an instruction has (192 of 384, else ``bn``), or
            tiles of all of k where products are of bits.
        row_stages: buffers for 128 bytes of k of the rows, where they do not stay.
        keeps_rows: all of k of the rows stays where it is at most six such buffers, for several tiles of columns.
        nibbles: rows' codes lie two a byte, 256 of k in such a buffer; where ``bn`` is of one instruction.
        holds: rows that stay do so in registers; of bytes without a sign, or of bits (`MOST_HELD`).
        twice: products of planes that count twice are made twice, in place of doubling sums.
        column_stages: buffers for what the epilogue knows of ``bn`` columns, where that is copied.
        column_bytes: of that, a column; 0: it is not copied.
        direct: ``bn`` is the width of a row of floats; they go from registers to memory, and their LayerNorm may follow.
        ahead: loads of what is added to such rows that a lane issues at once, an even number up to ``bn / 8``.
        early: the first of them are on their way from before a tile is multiplied.
        bits: one-bit products of the planes of two-bit codes.
        piece: floats of a row that come and go through shared memory at a time, 16, 32, 64 or 128; 0: none do.
        slots: pieces of float32 that a warp has room for, of float16 up to twice as many; divides ``bn / piece``.
        overlaps: such pieces of a tile are worked on while the next tile is multiplied; for ``bn`` of one instruction.
    """

    groups: int
    bn: int
    stages: int
    row_stages: int = 3
    direct: bool = False
    ahead: int = 6
    early: bool = True
    bits: bool = False
    piece: int = 0
    slots: int = 1
    overlaps: bool = False
    keeps_rows: bool = True
    nibbles: bool = False
    holds: bool = False
    twice: bool = False
    column_stages: int = 2
    column_bytes: int = 0

    kernel: ClassVar[str] = "gemm_hopper"

    def threads(self) -> int:
        """A warpgroup that copies, beside the others."""
        return 128 * (self.groups + 1)

    def _chunks(self, k: int) -> int:
        return bit_chunks(k) if self.bits else chunks(k)

    def _row_chunks(self, k: int) -> int:
        """Tiles that a row of codes has."""
        return nibble_chunks(k) if self.nibbles else self._chunks(k)

    def _resident(self, k: int) -> bool:
        return (self.keeps_rows or self.bits) and self._row_chunks(k) <= _RESIDENT

    def _part(self) -> int:
        """Columns of one instruction."""
        return 192 if self.bn > 256 else self.bn

    def _all_of_b(self, k: int) -> int:
        """Buffers that hold ``bn`` columns."""
        return 1 if self.bits else self._chunks(k) * (self.bn // self._part())

    def shared(self, k: int) -> int:
        """Rows, b, floats and codes on their way, constants, barriers."""
        rows = (self._row_chunks(k) if self._resident(k) else self.row_stages) * TILE_ROWS * self.groups * CHUNK
        stage = self._chunks(k) * self.bn * CHUNK if self.bits else self._part() * CHUNK
        floats = 4 * self.groups * (self.slots * 16 * (4 * self.piece + 32) + 256) if self.piece else 0
        out = 64 if self.direct else 0 if self.piece or self.column_bytes else self.bn
        columns = self.column_stages * (self.column_bytes * self.bn + 16) if self.column_bytes else 0
        codes = 4 * self.groups * 16 * (out + 16) if out else 0
        constants = 16 * self.bn if self.direct else 0
        barriers = 16 * (self.stages + self.groups * max(self._row_chunks(k) if self._resident(k) else 0, self.row_stages))
        return rows + self.stages * stage + columns + floats + codes + constants + barriers

    def defines(self, k: int) -> dict[str, int]:
        """See `Tile`."""
        return {
            "kGroups": self.groups,
            "kBN": self.bn,
            "kStages": self.stages,
            "kRowStages": self.row_stages,
            "DEPTH": pad(k, 256) // 4 if self.bits else k,
            "RESIDENT": int(self._resident(k)),
            "B_STAYS": int(self.direct and self.stages == self._all_of_b(k)),
            "BITS": int(self.bits),
            "A_NIBBLES": int(self.nibbles),
            "HELD": int(self.holds),
            "REST": int(self.holds and self.bits and self.twice and has_rest(k)),
            "STAGED": int(self.piece > 0),
            "DIRECT": int(self.direct),
            "kAhead": self.ahead,
            "RESIDUAL_EARLY": int(self.early),
            "kPiece": self.piece,
            "kSlots": self.slots,
            "OVERLAP": int(self.overlaps),
            # Where it does not come into shared memory a tile ahead, what is added is brought into the L2 cache beforehand.
            "PREFETCH": int(not self.overlaps),
            "TWICE": int(self.twice),
            "COLUMN_STAGES": self.column_stages if self.column_bytes else 0,
            "COLUMN_BYTES": self.column_bytes,
        }

    def tiles(self, m: int, n: int) -> int:
        """Of a product [m, n]."""
        return -(-m // (TILE_ROWS * self.groups)) * -(-n // self.bn)

    def blocks(self, m: int, n: int, multiprocessors: int) -> int:
        """One a multiprocessor, each with a range of tiles."""
        return min(multiprocessors, self.tiles(m, n))

    def suits(self, m: int, n: int, k: int, multiprocessors: int) -> bool:
        """Whether there is work for (nearly) all multiprocessors, and a block's shared memory holds its part."""
        fits = self.shared(k) <= MOST_SHARED and (self._resident(k) or not self.bits)
        return fits and self.tiles(m, n) >= _EVEN * multiprocessors


MOST_HELD = {False: 384, True: 512}  # k up to which registers hold rows, of bytes or as planes of bits
_MMA = (MmaTile(128, 128, 64, 4, 2, 2), MmaTile(64, 64, 64, 4, 4, 1), MmaTile(32, 64, 64, 4, 2, 1))
_HOPPER = tuple(HopperTile(*sizes) for sizes in ((3, 128, 4), (3, 128, 3), (2, 128, 4), (2, 64, 4)))
_BITS = tuple(
    HopperTile(*sizes, bits=True) for sizes in ((4, 128, 2), (3, 128, 4), (3, 128, 2), (2, 128, 3), (2, 128, 2), (2, 64, 2))
)
# k up to which what counts twice is multiplied twice in front of an activation. Microseconds of fc1 on an H100, twice and once:
# DeiT-S (384) 44.1 and 46.6, DeiT-B (768) 122 and 109.
_MOST_TWICE = 512
# For floats: the same with room for what is added to them.
_FLOATS = (
    HopperTile(2, 192, 4, row_stages=4, piece=32, slots=3, overlaps=True, keeps_rows=False),
    HopperTile(3, 128, 4, row_stages=3, piece=32, slots=2, overlaps=True),
    HopperTile(2, 128, 4, row_stages=4, piece=32, slots=4, overlaps=True),
    HopperTile(2, 64, 4, row_stages=4, piece=32, slots=2, overlaps=True),
)
_FLOATS_OF_BITS = (
    HopperTile(3, 128, 2, bits=True, piece=32, slots=2, overlaps=True),
    HopperTile(2, 128, 2, bits=True, piece=32, slots=2, overlaps=True),
    HopperTile(2, 64, 2, bits=True, piece=32, slots=2, overlaps=True),
    HopperTile(2, 64, 2, bits=True, holds=True, piece=32, slots=1, overlaps=True),
)
# For float16, of which longer pieces are as many bytes. On an H100, DeiT-S at batch 256: W4A4 4.82 instead of 4.94 ms (of proj
# alone, whose rows are short enough to stay), W2A2 3.85 instead of 4.00.
_HALVES = (HopperTile(2, 128, 4, piece=64, slots=2, overlaps=True),)
_HALVES_OF_BITS = (HopperTile(3, 128, 2, bits=True, twice=True, piece=64, slots=1, overlaps=True),)
_MOST_HALVES = 384  # k of bytes up to which that holds
# Of rows of 768 and longer: DeiT-B at W4A4 12.05 instead of 12.16 ms.
_WIDE_HALVES = (HopperTile(2, 128, 5, row_stages=4, piece=64, slots=2, overlaps=True, keeps_rows=False),)
_LEAST_WIDE = 768
# Of rows held in registers, for whole buffers of k (`has_rest`): DeiT-S at W2A2 3.86 instead of 3.88 ms, of fc2.
_LONG_HALVES_OF_BITS = (HopperTile(3, 64, 4, bits=True, twice=True, holds=True, piece=64, slots=1, overlaps=True),)
_LEAST_LONG = 1536
_NIBBLE_STAGES = 3  # buffers of codes that lie two a byte, at most: each has twice as many k
_WIDTHS = (64, 128, 192, 384)  # of whole rows that a warpgroup's registers hold
# Columns up to which LayerNorm follows a product of floats in the same launch. Measured on an H100 (docs/performance-gpu.md):
# rows of 192 gain at 2 bits; rows of 384 lose, as narrow tiles and a launch for LayerNorm are faster than tiles of that width.
WIDEST_NORM_BEHIND = 192


def _whole_rows(n: int, k: int) -> tuple[HopperTile, ...]:
    """All of b stays where that leaves room, else as much of it is on its way as there is room for."""
    part = 192 if n > 256 else n
    stay = HopperTile(2, n, chunks(k) * (n // part), row_stages=3, direct=True, keeps_rows=False)
    streams = HopperTile(2, n, 5, row_stages=4, direct=True, early=False, keeps_rows=False)
    return stay, streams


def _whole_rows_of_bits(n: int) -> tuple[HopperTile, ...]:
    return (HopperTile(2, n, 1, direct=True, bits=True),)


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
    tile = next((tile for tile in _BITS if tile.suits(m, n, k, multiprocessors)), None)
    return None if tile is None else replace(tile, twice=k <= _MOST_TWICE)


def with_columns(tile: Tile, k: int, column_bytes: int) -> Tile:
    """The tile with room for what its epilogue knows of columns, so many bytes each, where it has such room."""
    if isinstance(tile, HopperTile):
        for column_stages in range(tile.column_stages, 0, -1):
            wider = replace(tile, column_bytes=column_bytes, column_stages=column_stages)
            if wider.shared(k) <= MOST_SHARED:
                return wider
    return tile


def with_nibbles(tile: Tile | None, k: int) -> HopperTile | None:
    """The tile as it reads codes that lie two a byte; ``None`` where it does not know how.

    Rows that were to stay do so where a block has room for all of them, which are longer than those of bytes may be.
    """
    if not isinstance(tile, HopperTile) or tile.bits or tile.bn > 192 or k % NIBBLE_CHUNK:
        return None
    packed = replace(tile, nibbles=True, row_stages=min(tile.row_stages, _NIBBLE_STAGES))
    return next((one for one in (packed, replace(packed, keeps_rows=False)) if one.shared(k) <= MOST_SHARED), None)


def choose_floats(m: int, n: int, k: int, multiprocessors: int, bits: bool, half: bool = False) -> HopperTile | None:
    """A tile for floats of rows a multiple of four wide, on Hopper; ``None`` where there is none, or too little work.

    ``half``: they are float16, and rows a multiple of eight wide.
    """
    tiles: tuple[HopperTile, ...] = _FLOATS_OF_BITS if bits else _FLOATS
    if half and bits:
        tiles = (_LONG_HALVES_OF_BITS if k >= _LEAST_LONG and not has_rest(k) else ()) + _HALVES_OF_BITS + tiles
    elif half:
        tiles = (_WIDE_HALVES if n >= _LEAST_WIDE else _HALVES if k <= _MOST_HALVES else ()) + tiles
    even = n % (8 if half else 4) == 0
    fitting = (tile for tile in tiles if even and (n % tile.bn == 0 or tile.bn % 192 != 0))
    narrow = next((tile for tile in fitting if tile.suits(m, n, k, multiprocessors)), None)
    return narrow or choose_whole_rows(m, n, k, multiprocessors, bits)


def choose_whole_rows(m: int, n: int, k: int, multiprocessors: int, bits: bool) -> HopperTile | None:
    """A tile of whole rows, which LayerNorm can follow, on Hopper; ``None`` where there is none, or too little work."""
    tiles = () if n not in _WIDTHS else _whole_rows_of_bits(n) if bits else _whole_rows(n, k)
    return next((tile for tile in tiles if tile.suits(m, n, k, multiprocessors)), None)


def choose_norm_behind(m: int, n: int, k: int, multiprocessors: int, bits: bool) -> HopperTile | None:
    """A tile of whole rows where LayerNorm should follow in the same launch; ``None`` where it has one of its own."""
    return choose_whole_rows(m, n, k, multiprocessors, bits) if n <= WIDEST_NORM_BEHIND else None
