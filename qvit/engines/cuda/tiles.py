"""How products are cut into tiles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """A block's part of a product [M, K] x [K, N]; see ``src/gemm.cu``.

    Attributes:
        bm, bn: sums [bm, bn].
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

    @property
    def threads(self) -> int:
        """Of a block."""
        return 32 * self.warps_m * self.warps_n

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: the buffers, or the codes on their way out."""
        lines = self.warps_n * self.bm * (self.bn // self.warps_n + 16)
        return max(self.stages * (self.bm + self.bn) * self.bk, lines)

    @property
    def defines(self) -> dict[str, int]:
        """Its constants in the source."""
        return {
            "kBM": self.bm,
            "kBN": self.bn,
            "kBK": self.bk,
            "kStages": self.stages,
            "kWarpsM": self.warps_m,
            "kWarpsN": self.warps_n,
        }

    def blocks(self, m: int, n: int) -> int:
        """Tiles of a product [m, n]."""
        return -(-m // self.bm) * -(-n // self.bn)


LARGE = Tile(128, 128, 64, 4, 2, 2)
MIDDLE = Tile(64, 64, 64, 4, 4, 1)
SMALL = Tile(32, 64, 64, 4, 2, 1)


def choose(m: int, n: int, multiprocessors: int) -> Tile:
    """The largest tile that leaves no multiprocessor without work."""
    for tile in (LARGE, MIDDLE):
        if tile.blocks(m, n) >= multiprocessors:
            return tile
    return SMALL
