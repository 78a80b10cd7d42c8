"""What plans of a forward pass have in common: buffers for one batch size, and the launches between them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qvit.engines.cuda import constants as c
from qvit.engines.cuda import few_tiles
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.attention import attention_launch
from qvit.engines.cuda.device import Device
from qvit.engines.cuda.few_tiles import FewTile, choose_few
from qvit.engines.cuda.layout import CHUNK, TILE_ROWS, bit_chunks, chunks, from_planes, pad, untiled
from qvit.engines.cuda.model_constants import ModelConstants
from qvit.engines.cuda.shape import Shape
from qvit.engines.cuda.tiles import (
    MOST_SHARED,
    HopperTile,
    Tile,
    choose,
    choose_bits,
    choose_floats,
    choose_norm_behind,
    with_columns,
)
from qvit.integer.model import IntegerModel

_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
_FLOATS, _ACTIVATION, _HEADS, _FLOATS_AND_CODES = range(4)  # EPILOGUE of src/epilogue.cuh
_MOST_NARROW = 127  # distance of codes of a LayerNorm up to which 16 binary places are kept of each
_PIECE = 16  # bytes that a lane copies at a time
HIGHEST = 256  # rows: no tile of a product has more


Tap = Callable[[], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """A launch, and the codes that can be seen after it: point -> how to read them (int16)."""

    launch: Launch
    taps: dict[str, Tap]


class Plan(ABC):
    """All launches of a forward pass of ``batch`` images; `VitPlan` and `SwinPlan` put them together.

    Attributes:
        pixels: launches for uint8 and for float images; ``images`` is filled in.
        steps: what follows.
        logits: float32 [batch, classes], the result.
        strange: int32 [1], not 0 where an image held a value that is not finite.
    """

    def __init__(
        self,
        model: IntegerModel,
        constants: ModelConstants,
        batch: int,
        gpu: Device,
        with_map: bool = False,
        one_bit: bool = True,
        poison: bool = False,
    ) -> None:
        self.model, self.constants, self.batch = model, constants, batch
        self._gpu, self._one_bit, self._poison = gpu, one_bit, poison
        self._device = constants.patch.b.device
        a = model.architecture
        self.steps: list[Step] = []
        # Norms whose codes the next launch may make itself, by where they would be; codes that are to be seen are always there.
        self._late: dict[int, tuple[Launch, c.NormConstants]] = {}
        self._may_be_late = not with_map
        self._patches = self._codes(batch * a.num_patches, a.patch_features)
        self.strange = torch.zeros(1, dtype=torch.int32, device=self._device)
        self.logits = self._floats(batch, a.num_classes)
        self._shape: Shape  # of the blocks that launches are made for
        self._build(with_map)

    @abstractmethod
    def _build(self, with_map: bool) -> None:
        """Makes `steps`; with the softmax map's codes among the taps where ``with_map``."""

    def pixels(self, images: torch.Tensor) -> Launch:
        """The launch that makes codes of images [B, C, H, W], uint8 or float32, contiguous."""
        a, p = self.model.architecture, self.constants.pixels
        values = {
            "images": images,
            "codes": p.codes,
            "std": p.std,
            "offset": p.offset,
            "out": self._patches,
            "strange": self.strange,
            "rows": self.batch * a.num_patches,
            "step": p.step,
            "high": p.high,
        }
        (height, width), (patch_height, patch_width) = a.img_size, a.patch_size
        floats = images.dtype != torch.uint8
        unit = math.gcd(_PIECE, patch_width, width, 0 if floats else images.data_ptr())
        defines = {
            "FLOATS": int(floats),
            "IDENTITY": int(p.identity),
            "CHANNELS": a.in_chans,
            "HEIGHT": height,
            "WIDTH": width,
            "PATCH_HEIGHT": patch_height,
            "PATCH_WIDTH": patch_width,
            "UNIT": unit,
        }
        # A warp a chunk of four patches.
        warps = -(-self.batch * a.num_patches // 4) * chunks(a.patch_features)
        return Launch("pixels", defines, (-(-warps // 4), 1, 1), 128, 0, values)

    def patch_tap(self) -> torch.Tensor:
        """Codes of the patches, int16 [B, patches, K]."""
        a = self.model.architecture
        codes = untiled(self._patches)[: self.batch * a.num_patches, : a.patch_features]
        return codes.reshape(self.batch, a.num_patches, -1).to(torch.int16)

    # --- buffers ------------------------------------------------------------------------------------------------------

    def _bytes(self, *shape: int) -> torch.Tensor:
        out = torch.empty(shape, dtype=torch.uint8, device=self._device)
        return out.fill_(0xA5) if self._poison else out

    def _codes(self, rows: int, columns: int) -> torch.Tensor:
        """Room for a matrix of codes, in whole tiles: a product reads all rows of its last tile, wherever that begins."""
        return self._bytes(pad(rows, TILE_ROWS) + HIGHEST - TILE_ROWS, pad(columns, CHUNK))

    def _floats(self, rows: int, columns: int) -> torch.Tensor:
        out = torch.empty(rows, columns, dtype=torch.float32, device=self._device)
        return out.fill_(float("nan")) if self._poison else out

    # --- launches -----------------------------------------------------------------------------------------------------

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
        choice = self._gpu.tuned.find("planes", rows, layer.m, layer.k, True)
        if choice is not None:
            return choice.tile if isinstance(choice.tile, HopperTile) else None
        return choose_bits(rows, layer.m, layer.k, self._gpu.multiprocessors)

    def _chunks(self, layer: c.LinearConstants) -> int:
        """Tiles that a row of what a layer of a block reads has."""
        return chunks(layer.k) if self._bits(layer) is None else bit_chunks(layer.k)

    def _gemm(
        self,
        layer: c.LinearConstants,
        epilogue: dict[str, int],
        a: torch.Tensor,
        values: dict[str, Any],
        tile: Tile | None = None,
    ) -> None:
        rows = values.pop("rows")
        bits = isinstance(tile, HopperTile) and tile.bits
        late = self._late.pop(a.data_ptr(), None)
        defines = {}
        if late is not None:
            launch, norm = late
            if isinstance(tile, FewTile) and tile.normed:
                values["norm"] = {**launch.values, "gain": norm.place_gain, "shift": norm.place_shift}
                values["norm_margin"], values["norm_slope"] = norm.place_margins
                values["norm_eps"] = norm.eps
                defines = {"WIDE": int(norm.codes is not None and norm.codes.high - norm.codes.low > _MOST_NARROW)}
            else:
                self._add(launch)
        tile = tile or choose(rows, layer.m, layer.k, self._gpu.multiprocessors, self._gpu.hopper)
        direct = isinstance(tile, HopperTile) and tile.direct
        b, planes = (layer.b_by_fours, layer.b_planes_by_fours) if direct else (layer.b, layer.b_planes)
        values = {
            "a": a,
            "b": planes if bits else b,
            "scale": layer.scale,
            "bias": layer.bias,
            "m": rows,
            "n": layer.m,
            "k": layer.k,
            **values,
        }
        defines |= {
            "OUT_BITS": 0,
            **tile.defines(layer.k),
            "A_SIGNED": int(layer.signed),
            "W_HALF": int(layer.half),
            **epilogue,
        }
        if isinstance(tile, FewTile):
            defines |= {"K": layer.k, "TILES_N": -(-layer.m // tile.bn)}
        if defines.get("STAGED") or direct:
            assert values["ldo"] == layer.m
            defines["LDO"] = layer.m
        blocks = tile.blocks(rows, layer.m, self._gpu.multiprocessors)
        self._add(Launch(tile.kernel, defines, (blocks, 1, 1), tile.threads(), tile.shared(layer.k), values))

    def _linear(
        self,
        layer: c.LinearConstants,
        a: torch.Tensor,
        out: torch.Tensor,
        rows: int,
        residual: torch.Tensor | None = None,
        gamma: torch.Tensor | None = None,
        position: torch.Tensor | None = None,
        halved: bool = False,
        rows_in: int = 0,
        rows_out: int = 0,
        row_first: int = 0,
        index: torch.Tensor | None = None,
        tile: Tile | None = None,
    ) -> None:
        """``out = gamma * layer(a) + residual``; with a position, rows go where images with prefix tokens have them.

        With an index, int32 [rows], row r goes to row ``index[r]``.
        """
        values = {
            "rows": rows,
            "out": out,
            "residual": residual,
            "gamma": gamma,
            "position": position,
            "ldo": out.shape[1],
            "rows_in": rows_in,
            "rows_out": rows_out,
            "row_first": row_first,
            "index": index,
        }
        defines = {
            "EPILOGUE": _FLOATS,
            "RESIDUAL": int(residual is not None),
            "GAMMA": int(gamma is not None),
            "POSITION": int(position is not None),
            "SCATTER": int(index is not None),
            "HALVED": int(halved),
            "EVEN": int(layer.m % 2 == 0),
        }
        bits = isinstance(tile, HopperTile) and tile.bits
        few = None if bits else self._few(layer, a, rows, 8)
        if few is not None:
            fours = layer.m % 4 == 0 and out.shape[1] % 4 == 0
            arrays, added = 2 + (gamma is not None), (residual is not None) + (position is not None)
            tile = few.with_spread(few.beside_floats(arrays, added)) if few_tiles.SPREAD and fours else few
        elif self._gpu.hopper and not (residual is not None and position is not None):
            choice = self._gpu.tuned.find("floats", rows, layer.m, layer.k, bits)
            found = choice.tile if choice else choose_floats(rows, layer.m, layer.k, self._gpu.multiprocessors, bits)
            tile = found or tile
        self._gemm(layer, defines, a, values, tile)

    def _linear_norm(
        self,
        layer: c.LinearConstants,
        a: torch.Tensor,
        out: torch.Tensor,
        residual: torch.Tensor,
        gamma: torch.Tensor | None,
        following: tuple[c.NormConstants, c.LinearConstants] | None,
        codes: torch.Tensor,
        index: torch.Tensor | None = None,
        gather: torch.Tensor | None = None,
        rows: int | None = None,
    ) -> None:
        """``out = residual + gamma * layer(a)``, and the codes of what follows: in one launch where that is faster.

        With an index, int32 [rows], row r goes to row ``index[r]`` of out and codes; of the codes alone where its inverse
        ``gather`` is beside it. ``rows``: of a chunk; all rows where it is left out.
        """
        rows, width = self._shape.rows if rows is None else rows, out.shape[1]
        tile = None if following is None else self._norm_behind(layer, rows)
        if following is None or tile is None:
            to = None if gather is not None else index
            self._linear(layer, a, out, rows, residual=residual, gamma=gamma, index=to, tile=self._bits(layer, rows))
            if following is not None:
                self._norm(following[0], out, codes, rows, width, following[1], index=gather)
            return
        norm, reader = following
        assert norm.codes is not None
        values = {
            "rows": rows,
            "out": out,
            "out_k": codes,
            "index": index,
            "residual": residual,
            "gamma": gamma,
            "ldo": out.shape[1],
            "chunks": self._chunks(reader),
            "inverse": norm.gain,
            "shift": norm.shift,
            "weight": norm.weight,
            "affine": norm.bias,
            "offset": norm.codes.offset,
            "step": norm.codes.step,
            "low": norm.codes.low,
            "high": norm.codes.high,
            "margin": norm.margin,
            "eps": norm.eps,
        }
        defines = {
            "EPILOGUE": _FLOATS_AND_CODES,
            "RESIDUAL": 1,
            "GAMMA": int(gamma is not None),
            "POSITION": 0,
            "SCATTER": 0 if index is None else 1 if gather is None else 2,
            "HALVED": 0,
            "EVEN": 1,
            "OUT_BITS": int(self._bits(reader) is not None),
        }
        self._gemm(layer, defines, a, values, tile)

    def _norm_behind(self, layer: c.LinearConstants, rows: int) -> Tile | None:
        """How a layer of a block is computed with LayerNorm behind it, in the same launch; ``None`` where it is not."""
        if not self._gpu.hopper:
            return None
        bits = self._bits(layer) is not None
        choice = self._gpu.tuned.find("rows", rows, layer.m, layer.k, bits)
        rule = choose_norm_behind(rows, layer.m, layer.k, self._gpu.multiprocessors, bits)
        return rule if choice is None else choice.tile

    def _activation(self, block: dict[str, Any], a: torch.Tensor, out: torch.Tensor, rows: int | None = None) -> None:
        """fc1 of a block, and the codes that fc2 reads; ``rows`` of a chunk, or all."""
        rows = self._shape.rows if rows is None else rows
        codes: c.CodeConstants = block["fc2_codes"]
        values = {
            "out": out,
            "inverse": codes.inverse,
            "offset": codes.offset,
            "step": codes.step,
            "rows": rows,
            "ldo": self._chunks(block["fc2"]),
            "low": codes.low,
            "high": codes.high,
            "margin": block["fc2_margin"],
        }
        layer, activation = block["fc1"], block["activation"]
        defines = {
            "EPILOGUE": _ACTIVATION,
            "ACTIVATION": _ACTIVATIONS.index(self.model.architecture.activation),
            "CELLS": activation.cells,
            "OUT_BITS": int(self._bits(block["fc2"]) is not None),
        }
        column_bytes = 0 if activation.permuted is None else activation.permuted.column_bytes
        tile, bits = self._tile(layer, a, 32 if defines["CELLS"] or defines["OUT_BITS"] else 16, column_bytes, rows)
        if activation.permuted is not None:
            cut = tile.defines(layer.k)
            width = cut["kPart"] if isinstance(tile, FewTile) else cut["kBN"] // cut.get("kWarpsN", 1)
            if few_tiles.SPREAD and isinstance(tile, FewTile) and not defines["OUT_BITS"]:
                width = 8  # columns in their own order
                tile = tile.with_spread(tile.bn * activation.permuted.column_bytes)
            values |= activation.permuted.arrays(layer, width, bits, bool(defines["OUT_BITS"]))
        self._gemm(layer, defines, a, values, tile)

    def _tile(self, layer: c.LinearConstants, a: torch.Tensor, part: int, column_bytes: int, rows: int) -> tuple[Tile, bool]:
        """How ``rows`` rows of a layer of a block are computed from ``a``, and whether with one-bit products.

        ``part``: see `choose_few`; ``column_bytes``: see `with_columns`.
        """
        tile = self._bits(layer, rows)
        if tile is not None:
            return with_columns(tile, layer.k, column_bytes), True
        if (few := self._few(layer, a, rows, part)) is not None:
            return few, False
        choice = self._gpu.tuned.find("codes", rows, layer.m, layer.k, False)
        known = None if choice is None else choice.tile
        found = known or choose(rows, layer.m, layer.k, self._gpu.multiprocessors, self._gpu.hopper)
        return with_columns(found, layer.k, column_bytes), False

    def _few(self, layer: c.LinearConstants, a: torch.Tensor, rows: int, part: int) -> FewTile | None:
        """A tile for few rows; one with the LayerNorm of its rows, where that has been put off for ``a``."""
        tile, shared = None, MOST_SHARED if self._gpu.hopper else few_tiles.MOST_SHARED
        if a.data_ptr() in self._late:
            tile = choose_few(rows, layer.m, layer.k, part, self._gpu.multiprocessors, True, shared)
        return tile or choose_few(rows, layer.m, layer.k, part, self._gpu.multiprocessors, False, shared)

    def _heads(self, block: dict[str, Any], a: torch.Tensor, out: tuple[torch.Tensor, ...], name: str) -> None:
        heads: c.HeadConstants = block["heads"]
        shape = self._shape
        (low, high), (low_k, high_k), (low_v, high_v) = heads.ranges
        values = {
            "out": out[0],
            "out_k": out[1],
            "out_v": out[2],
            "inverse": heads.gain,
            "shift": heads.shift,
            "offset": heads.offset,
            "step": heads.step,
            "weight": heads.weight,
            "affine": heads.affine,
            "rows": shape.rows,
            "heads": shape.heads,
            "tokens": shape.tokens,
            "low": low,
            "high": high,
            "margin": heads.margins[0],
            "low_k": low_k,
            "high_k": high_k,
            "margin_k": heads.margins[1],
            "low_v": low_v,
            "high_v": high_v,
            "eps": heads.eps,
        }
        layer: c.LinearConstants = block["qkv"]
        column_bytes = 0 if heads.permuted is None else heads.permuted.column_bytes
        tile, bits = self._tile(layer, a, shape.head_dim, column_bytes, shape.rows)
        if heads.permuted is not None:
            (margin, slope), (margin_k, slope_k) = heads.permuted_margins
            values |= {"margin": margin, "slope": slope, "margin_k": margin_k, "slope_k": slope_k}
            values |= {"tokens_inverse": min(2**32 // shape.tokens, 2**32 - 1)}
            width = shape.head_dim
            if few_tiles.SPREAD and isinstance(tile, FewTile):
                width = 8  # columns in their own order
                tile = tile.with_spread(20 * tile.bn)
            values |= heads.permuted.arrays(layer, width, bits)
        defines = {
            "EPILOGUE": _HEADS,
            "PERMUTED": int(heads.permuted is not None),
            "HEAD_DIM": shape.head_dim,
            "RECTIFY": int(heads.rectify),
            "Q_DOUBLED": int(heads.doubled),
        }
        self._gemm(layer, defines, a, values, tile)
        for part, codes, (least, _) in zip(("q", "k", "v"), out, heads.ranges, strict=True):
            doubled = part == "q" and heads.doubled
            self._tap(f"{name}.attn.{part}", codes, tuple(codes.shape), least < 0 or doubled, doubled)

    def _attention(
        self, block: dict[str, Any], q_k_v: tuple[torch.Tensor, ...], maps: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        proj: c.LinearConstants = block["proj"]
        bits = self._bits(proj) is not None
        self._add(attention_launch(self._shape, self._gpu, block, q_k_v, maps, out, self._chunks(proj), bits))

    def _norm(
        self,
        norm: c.NormConstants | c.CodeConstants,
        x: torch.Tensor,
        out: torch.Tensor,
        rows: int,
        ldx: int,
        to: c.LinearConstants | int,
        row: int = 0,
        index: torch.Tensor | None = None,
    ) -> None:
        """``norm`` of rows of x, ``ldx`` floats apart, from row ``row``; a `CodeConstants` makes codes without a norm.

        With an index, int32 [rows * pieces], a row is put together of as many rows of x.
        """
        pieces = 0 if index is None else len(index) // rows
        width = x.shape[1] * max(pieces, 1)
        codes = norm if isinstance(norm, c.CodeConstants) else norm.codes
        ldo = to if isinstance(to, int) else self._chunks(to)
        values: dict[str, Any] = {"x": x.reshape(-1)[row * width :], "out": out, "ldx": ldx, "ldo": ldo, "rows": rows}
        values["index"] = index
        if isinstance(norm, c.NormConstants):
            values |= {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps}
            values |= {"gain": norm.gain, "shift": norm.shift, "margin": norm.margin}
        if codes is not None:
            values |= {"offset": codes.offset, "step": codes.step, "low": codes.low, "high": codes.high}
        warps = 4
        defines = {
            "CHANNELS": width,
            "WARPS": warps,
            "OUT_FLOAT": int(codes is None),
            "IDENTITY": int(isinstance(norm, c.CodeConstants)),
            "OUT_BITS": int(not isinstance(to, int) and self._bits(to) is not None),
            "GATHER": pieces,
        }
        launch = Launch("norm", defines, (-(-rows // warps), 1, 1), 32 * warps, 0, values)
        plain = codes is not None and not pieces
        plain &= isinstance(to, int) or self._bits(to) is None
        if isinstance(norm, c.NormConstants) and plain and self._may_be_late:
            self._late[out.data_ptr()] = launch, norm
        else:
            self._add(launch)

    def _average(self, x: torch.Tensor, first: int) -> torch.Tensor:
        """The final norm of every token, if there is one, and the average of an image's tokens from ``first`` on."""
        (rows, width), norm = x.shape, self.constants.norm
        if norm is not None:
            tokens = self._floats(rows, width)
            self._norm(norm, x, tokens, rows, width, width)
            x = tokens
        pooled = self._floats(self.batch, width)
        values = {"x": x, "out": pooled, "tokens": rows // self.batch, "first": first, "channels": width}
        self._add(Launch("pool", {}, (self.batch, -(-width // 128), 1), 128, 0, values))
        return pooled

    def _logits(self, x: torch.Tensor, apart: int) -> None:
        """The heads, of rows ``apart`` floats apart; head i reads token i."""
        a, constants, width = self.model.architecture, self.constants, x.shape[1]
        for index, (name, (norm, layer)) in enumerate(zip(a.heads, constants.heads, strict=True)):
            codes = self._codes(self.batch, width)
            row, source, ldx = index, x, apart
            if constants.pooled_norm is not None:
                floats = self._floats(self.batch, width)
                self._norm(constants.pooled_norm, x, floats, self.batch, apart, width, row)
                row, source, ldx = 0, floats, width
            self._norm(norm, source, codes, self.batch, ldx, chunks(width), row)
            self._tap(f"{name}.input", codes, (self.batch, width), layer.signed)
            self._linear(layer, codes, self.logits, self.batch, residual=self.logits if index else None, halved=bool(index))
