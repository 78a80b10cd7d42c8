"""Products of codes, and what is computed in their launches in front and behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from qvit.engines.cuda import constants as c
from qvit.engines.cuda import few_tiles, tiles
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.choices import Choices
from qvit.engines.cuda.device import Device
from qvit.engines.cuda.few_tiles import FewTile
from qvit.engines.cuda.shape import Shape
from qvit.engines.cuda.steps import is_half
from qvit.engines.cuda.tiles import HopperTile, Tile, choose, with_nibbles

_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
_FLOATS, _ACTIVATION, _HEADS, _FLOATS_AND_CODES = range(4)  # EPILOGUE of src/epilogue.cuh
_MOST_NARROW = 127  # distance of codes of a LayerNorm up to which 16 binary places are kept of each


class Products(Choices):
    """Launches of linear layers and LayerNorms, which meet in one launch where that is faster.

    Args:
        activation: behind fc1, as an architecture names it.
        may_be_late: whether a LayerNorm may be put off until the launch that reads its codes, which then makes them itself.
    """

    def __init__(
        self, gpu: Device, device: torch.device, one_bit: bool, poison: bool, activation: str, may_be_late: bool
    ) -> None:
        super().__init__(gpu, device, one_bit, poison)
        self._activation_name, self._may_be_late = activation, may_be_late

    def _gemm(
        self,
        layer: c.LinearConstants,
        epilogue: dict[str, int],
        a: torch.Tensor,
        values: dict[str, Any],
        tile: Tile | None = None,
        columns: tuple[int, int] | None = None,
    ) -> None:
        """A product and its epilogue; of some columns, if given, in whole tiles, which begin with the first but on Hopper."""
        rows = values.pop("rows")
        first, last = columns or (0, layer.m)
        bits = isinstance(tile, HopperTile) and tile.bits
        late = self._late.pop(a.data_ptr(), None)
        defines = {}
        if late is not None:
            launch = late
            if isinstance(tile, FewTile) and tile.normed:
                values["norm"] = launch.values
                defines = {name: launch.defines[name] for name in ("WIDE", "X_HALF")}
            else:
                self._add(launch)
        tile = tile or choose(rows, layer.m, layer.k, self._gpu.multiprocessors, self._gpu.hopper)
        direct = isinstance(tile, HopperTile) and tile.direct
        packed = isinstance(tile, HopperTile) and tile.nibbles
        assert packed == (layer in self._packed)
        b, planes = (layer.b_by_fours, layer.b_planes_by_fours) if direct else (layer.b, layer.b_planes)
        if packed:
            b = layer.b_by_fours_and_nibbles if direct else layer.b_by_nibbles
        values = {
            "a": a,
            "b": planes if bits else b,
            "scale": layer.scale,
            "bias": layer.bias,
            "m": rows,
            "n": last,
            "k": layer.k,
            **values,
        }
        defines |= {
            "OUT_BITS": 0,
            "OUT_NIBBLES": 0,
            "A_NIBBLES": 0,
            **tile.defines(layer.k),
            "A_SIGNED": int(layer.signed),
            "W_HALF": int(layer.half),
            **epilogue,
        }
        if isinstance(tile, FewTile):
            defines |= {"K": layer.k, "TILES_N": -(-last // tile.bn)}
        if isinstance(tile, HopperTile):
            defines["FIRST"] = first
        assert not first or isinstance(tile, HopperTile)
        assert (first, last) == (0, layer.m) or first % tile.defines(layer.k)["kBN"] == last % tile.defines(layer.k)["kBN"] == 0
        if defines.get("STAGED") or direct:
            assert values["ldo"] == layer.m
            defines["LDO"] = layer.m
        blocks = tile.blocks(rows, last - first, self._gpu.multiprocessors)
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
            "OUT_HALF": is_half(out),
        }
        bits = isinstance(tile, HopperTile) and tile.bits
        few = None if bits else self._few(layer, a, rows, 8)
        if few is not None:
            fours = layer.m % 4 == 0 and out.shape[1] % 4 == 0
            arrays, added = 2 + (gamma is not None), (residual is not None) + (position is not None)
            tile = few.with_spread(few.beside_floats(arrays, added)) if few_tiles.SPREAD and fours else few
        elif self._gpu.hopper and not (residual is not None and position is not None):
            # Tiles are measured in passes of so many rows, all their chunks with one; what adds to its input is of a block.
            whole = rows if residual is None else self._shape.rows
            tile = self._of_floats(layer, rows, whole, bits, bool(is_half(out))) or tile
            tile = with_nibbles(tile, layer.k) if layer in self._packed else tile
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
            "OUT_HALF": is_half(out),
            "OUT_BITS": int(self._bits(reader) is not None),
        }
        self._gemm(layer, defines, a, values, tile)

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
        out_bits = self._bits(block["fc2"]) is not None
        compares = out_bits and activation.compared is not None and self._bits(layer, rows) is not None
        permuted = activation.compared if compares else activation.permuted
        defines = {
            "EPILOGUE": _ACTIVATION,
            "ACTIVATION": _ACTIVATIONS.index(self._activation_name),
            "RISING": activation.rising if compares else 0,
            "FALLING": activation.falling if compares else 0,
            "CELLS": 0 if compares else activation.cells,
            "OUT_BITS": int(out_bits),
            "OUT_NIBBLES": int(block["fc2"] in self._packed),
        }
        column_bytes = 0 if permuted is None else permuted.column_bytes
        part = 64 if defines["OUT_BITS"] else 32 if defines["CELLS"] else 16
        tile, bits = self._tile(layer, a, part, column_bytes, rows)
        assert isinstance(tile, HopperTile) or not defines["OUT_NIBBLES"]
        if isinstance(tile, HopperTile) and tile.column_bytes:
            stays = bool(tile.defines(layer.k)["RESIDENT"])  # a measured tile's rows may stream
            tile = replace(tile, holds=stays and layer.k <= tiles.MOST_HELD[bits] and not layer.signed)
        if permuted is not None:
            cut = tile.defines(layer.k)
            width = cut["kPart"] if isinstance(tile, FewTile) else cut["kBN"] // cut.get("kWarpsN", 1)
            if few_tiles.SPREAD and isinstance(tile, FewTile) and not defines["OUT_BITS"]:
                width = 8  # columns in their own order
                tile = tile.with_spread(tile.bn * permuted.column_bytes)
            values |= permuted.arrays(layer, width, bits, out_bits, bool(cut.get("REST")))
        self._gemm(layer, defines, a, values, tile)

    def _queries_apart(self, block: dict[str, Any], few_rows: Shape) -> FewTile | None:
        """How q of ``few_rows`` is computed where k and v of all rows are a product by themselves; ``None`` where they are not.

        Both have whole tiles of columns then. The blocks' codes are to be those of ``few_rows`` when q is computed.
        """
        layer, heads, shape = block["qkv"], block["heads"], self._shape
        column_bytes = 0 if heads.permuted is None else heads.permuted.column_bytes
        nowhere = self._bytes(0)  # where no LayerNorm has been put off
        many, _ = self._tile(layer, nowhere, shape.head_dim, column_bytes, shape.rows)
        self._shape = few_rows
        few, _ = self._tile(layer, nowhere, shape.head_dim, column_bytes, few_rows.rows)
        self._shape = shape
        if not isinstance(many, HopperTile) or not isinstance(few, FewTile):
            return None
        return few if shape.width % many.bn == shape.width % few.bn == 0 else None

    def _heads(
        self,
        block: dict[str, Any],
        a: torch.Tensor,
        out: tuple[torch.Tensor, ...],
        name: str,
        parts: tuple[int, int] = (0, 3),
        few: FewTile | None = None,
    ) -> None:
        """q, k and v of a block in heads; of these three, in this order, from a first one up to a last, if given.

        ``few``: the tile, where it has been chosen.
        """
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
        tile, bits = (few, False) if few else self._tile(layer, a, shape.head_dim, column_bytes, shape.rows)
        if bits:
            assert isinstance(tile, HopperTile)
            tile = replace(tile, twice=False)  # DeiT-S on an H100: 65.9 instead of 66.9 us
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
        self._gemm(layer, defines, a, values, tile, (parts[0] * shape.width, parts[1] * shape.width))
        for part, codes, (least, _) in zip(("q", "k", "v"), out, heads.ranges, strict=True):
            doubled = part == "q" and heads.doubled
            self._tap(f"{name}.attn.{part}", codes, tuple(codes.shape), least < 0 or doubled, doubled)

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
            values |= {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps, "eps_float": norm.eps}
            margin, slope = norm.place_margins
            values |= {"gain": norm.place_gain, "shift": norm.place_shift, "margin": margin, "slope": slope}
        if codes is not None:
            values |= {"offset": codes.offset, "step": codes.step, "low": codes.low, "high": codes.high}
        warps = 4
        defines = {
            "CHANNELS": width,
            "WARPS": warps,
            "WIDE": int(codes is not None and codes.high - codes.low > _MOST_NARROW),
            "OUT_FLOAT": int(codes is None),
            "X_HALF": is_half(x),
            "OUT_HALF": is_half(out),
            "IDENTITY": int(isinstance(norm, c.CodeConstants)),
            "OUT_BITS": int(not isinstance(to, int) and self._bits(to) is not None),
            "GATHER": pieces,
        }
        launch = Launch("norm", defines, (-(-rows // warps), 1, 1), 32 * warps, 0, values)
        plain = codes is not None and not pieces
        plain &= isinstance(to, int) or self._bits(to) is None
        if isinstance(norm, c.NormConstants) and plain and self._may_be_late:
            self._late[out.data_ptr()] = launch
        else:
            self._add(launch)
