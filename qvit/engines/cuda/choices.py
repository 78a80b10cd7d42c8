"""Which tile computes a product: one that was measured on the GPU at hand, else the one that rules choose."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from qvit.engines.cuda import constants as c
from qvit.engines.cuda import few_tiles
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.device import Device
from qvit.engines.cuda.few_tiles import FewTile, choose_few
from qvit.engines.cuda.steps import Steps
from qvit.engines.cuda.tiles import (
    MOST_SHARED,
    HopperTile,
    Tile,
    choose,
    choose_floats,
    choose_norm_behind,
    with_columns,
    with_nibbles,
)

_MOST_PACKED = 15  # code of which two fit a byte


class Choices(Steps):
    """How launches to come are computed; whether as planes of bits is known to `Steps`, whose codes lie that way.

    Tiles are measured in passes of so many rows: they go by all rows of a block, rules by those that a launch has.
    """

    def __init__(self, gpu: Device, device: torch.device, one_bit: bool, poison: bool) -> None:
        super().__init__(gpu, device, one_bit, poison)
        # Norms whose codes the next launch may make itself, by where they would be; codes that are to be seen are always there.
        self._late: dict[int, Launch] = {}

    def _tile(self, layer: c.LinearConstants, a: torch.Tensor, part: int, column_bytes: int, rows: int) -> tuple[Tile, bool]:
        """How ``rows`` rows of a layer of a block are computed from ``a``, and whether with one-bit products.

        ``part``: see `choose_few`; ``column_bytes``: see `with_columns`.
        """
        tile = self._bits(layer, rows)
        if tile is not None:
            return with_columns(tile, layer.k, column_bytes), True
        if (few := self._few(layer, a, rows, part)) is not None:
            return few, False
        choice = self._gpu.tuned.find("codes", self._shape.rows, layer.m, layer.k, bits=False, half=False)
        known = None if choice is None else choice.tile
        found = known or choose(rows, layer.m, layer.k, self._gpu.multiprocessors, self._gpu.hopper)
        return with_columns(found, layer.k, column_bytes), False

    def _few(self, layer: c.LinearConstants, a: torch.Tensor, rows: int, part: int) -> FewTile | None:
        """A tile for few rows; one with the LayerNorm of its rows, where that has been put off for ``a``."""
        tile, shared = None, MOST_SHARED if self._gpu.hopper else few_tiles.MOST_SHARED
        if a.data_ptr() in self._late:
            tile = choose_few(rows, layer.m, layer.k, part, self._gpu.multiprocessors, True, shared)
        return tile or choose_few(rows, layer.m, layer.k, part, self._gpu.multiprocessors, False, shared)

    def _of_floats(self, layer: c.LinearConstants, rows: int, whole: int, bits: bool, half: bool) -> Tile | None:
        """How a product of floats is computed on Hopper, of a pass of ``whole`` rows; ``None`` where there is no such tile."""
        choice = self._gpu.tuned.find("floats", whole, layer.m, layer.k, bits, half)
        return choice.tile if choice else choose_floats(rows, layer.m, layer.k, self._gpu.multiprocessors, bits, half)

    def _norm_behind(self, layer: c.LinearConstants, rows: int) -> Tile | None:
        """How a layer of a block is computed with LayerNorm behind it, in the same launch; ``None`` where it is not."""
        if not self._gpu.hopper:
            return None
        bits = self._bits(layer) is not None
        choice = self._gpu.tuned.find("rows", self._shape.rows, layer.m, layer.k, bits, self._half)
        rule = choose_norm_behind(rows, layer.m, layer.k, self._gpu.multiprocessors, bits)
        found = rule if choice is None else choice.tile
        return with_nibbles(found, layer.k) if layer in self._packed else found

    def _pack(self, block: dict[str, Any], counts: Iterable[int]) -> None:
        """Lets codes between fc1 and fc2 of a block lie two a byte, if all its launches of so many rows know how."""
        fc1, fc2, codes, table = block["fc1"], block["fc2"], block["fc2_codes"], block["activation"].permuted
        if not self._gpu.hopper or table is None or self._bits(fc2) is not None:
            return
        if codes.low < 0 or codes.high > _MOST_PACKED:
            return
        nowhere = self._bytes(0)  # where no LayerNorm has been put off
        for rows in counts:
            writes, _ = self._tile(fc1, nowhere, 32, table.column_bytes, rows)
            reads = self._few(fc2, nowhere, rows, 8) or self._of_floats(fc2, rows, self._shape.rows, False, self._half)
            behind = self._norm_behind(fc2, rows) or reads
            if not isinstance(writes, HopperTile) or None in (with_nibbles(reads, fc2.k), with_nibbles(behind, fc2.k)):
                return
        self._packed.add(fc2)
