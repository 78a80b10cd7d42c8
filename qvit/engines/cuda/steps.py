"""Buffers for one batch size, launches that pass them on, and the codes that can be seen in between."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qvit.engines.cuda import constants as c
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.device import Device
from qvit.engines.cuda.layout import (
    CHUNK,
    TILE_ROWS,
    bit_chunks,
    chunks,
    from_nibbles,
    from_planes,
    nibble_chunks,
    pad,
    untiled,
)
from qvit.engines.cuda.shape import Shape
from qvit.engines.cuda.tiles import HopperTile, choose_bits

HIGHEST = 256  # rows: no tile of a product has more

Tap = Callable[[], torch.Tensor]


def is_half(x: torch.Tensor) -> int:
    """What kernels are compiled with for floats of the residual stream: 1 where they are float16; see ``src/stream.cuh``."""
    return int(x.dtype == torch.float16)


@dataclass(frozen=True, eq=False)
class Step:
    """A launch, and the codes that can be seen after it: point -> how to read them (int16)."""

    launch: Launch
    taps: dict[str, Tap]


class Steps:
    """Launches as they are put together.

    Attributes:
        steps: so far.
    """

    def __init__(self, gpu: Device, device: torch.device, one_bit: bool, poison: bool) -> None:
        self._gpu, self._device, self._one_bit, self._poison = gpu, device, one_bit, poison
        self.steps: list[Step] = []
        self._packed: set[c.LinearConstants] = set()  # layers that read codes two a byte
        self._shape: Shape  # of the blocks that launches are made for
        self._stream = torch.float32  # type of the residual stream, where a plan says nothing else

    @property
    def _half(self) -> bool:
        """Whether the residual stream is float16."""
        return self._stream == torch.float16

    def _bytes(self, *shape: int) -> torch.Tensor:
        out = torch.empty(shape, dtype=torch.uint8, device=self._device)
        return out.fill_(0xA5) if self._poison else out

    def _codes(self, rows: int, columns: int) -> torch.Tensor:
        """Room for a matrix of codes, in whole tiles: a product reads all rows of its last tile, wherever that begins."""
        return self._bytes(pad(rows, TILE_ROWS) + HIGHEST - TILE_ROWS, pad(columns, CHUNK))

    def _floats(self, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        out = torch.empty(rows, columns, dtype=dtype, device=self._device)
        return out.fill_(float("nan")) if self._poison else out

    def _add(self, launch: Launch) -> None:
        self.steps.append(Step(launch, {}))

    def _tap(self, name: str, codes: torch.Tensor, shape: tuple[int, ...], signed: bool, doubled: bool = False) -> None:
        def read() -> torch.Tensor:
            whole = codes.view(torch.int8) if signed else codes
            if codes.dim() == 2:  # a matrix in tiles
                whole = untiled(whole)[: math.prod(shape[:-1]), : shape[-1]]
            out = whole.to(torch.int16).reshape(shape)
            return (out - 1) // 2 if doubled else out

        self.steps[-1].taps[name] = read

    def _tap_input(self, name: str, codes: torch.Tensor, layer: c.LinearConstants, *rows: int) -> None:
        """The codes that a layer of a block reads, as [*rows, K]."""
        shape = (*rows, layer.k)
        if layer in self._packed:

            def read_packed() -> torch.Tensor:
                columns = nibble_chunks(layer.k) * CHUNK
                memory = codes.reshape(-1)[: len(codes) * columns].reshape(len(codes), columns)
                return from_nibbles(untiled(memory)[: math.prod(rows)]).to(torch.int16).reshape(shape)

            self.steps[-1].taps[name] = read_packed
            return
        if self._bits(layer) is None:
            self._tap(name, codes, shape, layer.signed)
            return

        def read() -> torch.Tensor:
            columns = bit_chunks(layer.k) * CHUNK
            memory = codes.reshape(-1)[: len(codes) * columns].reshape(len(codes), columns)
            return from_planes(untiled(memory)[: math.prod(rows)], layer.k).to(torch.int16).reshape(shape)

        self.steps[-1].taps[name] = read

    def _bits(self, layer: c.LinearConstants, rows: int | None = None) -> HopperTile | None:
        """How a layer of a block is computed with one-bit products; ``None`` where it is not.

        With ``rows``, of so many rows of a chunk; that all rows go one way decides it for every chunk.
        """
        if layer.b_planes is None or not (self._gpu.hopper and self._one_bit):
            return None
        whole = self._bits_of(layer, self._shape.rows)
        if whole is None or rows is None:
            return whole
        return self._bits_of(layer, rows) or whole

    def _bits_of(self, layer: c.LinearConstants, rows: int) -> HopperTile | None:
        choice = self._gpu.tuned.find("planes", self._shape.rows, layer.m, layer.k, True, self._half)
        if choice is not None:
            return choice.tile if isinstance(choice.tile, HopperTile) else None
        return choose_bits(rows, layer.m, layer.k, self._gpu.multiprocessors)

    def _chunks(self, layer: c.LinearConstants) -> int:
        """Tiles that a row of what a layer of a block reads has."""
        if layer in self._packed:
            return nibble_chunks(layer.k)
        return chunks(layer.k) if self._bits(layer) is None else bit_chunks(layer.k)
