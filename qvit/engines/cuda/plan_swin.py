"""The launches of a Swin Transformer.

The residual stream lies in the order of the map. Codes in front of qkv and proj, and q, k, v between them, lie in the order of
windows, so that every window is an image of a few tokens; an index says where a row is read (LayerNorm) and added (proj).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from qvit.engines.cuda import constants as c
from qvit.engines.cuda.layout import chunks
from qvit.engines.cuda.plan import Plan
from qvit.engines.cuda.shape import Shape
from qvit.engines.cuda.windows import square_rows, window_rows
from qvit.integer.ops import Block, PatchMerging, Windows


class SwinPlan(Plan):
    """All launches of a forward pass of a Swin Transformer; see `Plan`."""

    def _build(self, with_map: bool) -> None:
        model, constants = self.model, self.constants
        self._indices: dict[Any, torch.Tensor] = {}
        x, blocks = self._embed(), iter(constants.blocks)
        for stage, merging in zip(model.stages, constants.merging, strict=True):
            if stage.merging is not None:
                assert merging is not None
                x = self._merge(x, stage.merging, *merging)
            self._blocks(x, stage.blocks, [next(blocks) for _ in stage.blocks], with_map)
        self._logits(self._average(x, 0), x.shape[1])

    def _embed(self) -> torch.Tensor:
        """Patches and their norm, of the residual stream [B L, C]."""
        a, constants = self.model.architecture, self.constants
        rows, width = self.batch * a.num_patches, a.embed_dim
        patches = self._floats(rows, width)
        x = patches if self._stream == patches.dtype else self._floats(rows, width, self._stream)
        self._linear(constants.patch, self._patches, patches, rows)
        assert constants.norm_pre is not None
        self._norm(constants.norm_pre, patches, x, rows, width, width)
        return x

    def _merge(self, x: torch.Tensor, merging: PatchMerging, norm: c.NormConstants, layer: c.LinearConstants) -> torch.Tensor:
        """2 x 2 neighbours become one token, [B L, C] -> [B L / 4, M]."""
        (height, width), rows = merging.map, len(x) // 4
        index = self._index(merging.map, partial(square_rows, merging.map, self.batch))
        codes, out = self._codes(rows, layer.k), self._floats(rows, layer.m, self._stream)
        self._norm(norm, x, codes, rows, x.shape[1], chunks(layer.k), index=index)
        self._tap(f"{merging.reduction.name}.input", codes, (self.batch, height // 2, width // 2, layer.k), layer.signed)
        self._linear(layer, codes, out, rows)
        return out

    def _blocks(self, x: torch.Tensor, blocks: Sequence[Block], constants: Sequence[dict[str, Any]], with_map: bool) -> None:
        """The blocks of one stage, on x in place."""
        batch, width, hidden = self.batch, x.shape[1], constants[0]["fc1"].m
        first = blocks[0].attention
        assert first.windows is not None
        images, n = batch * first.windows.count, first.windows.area
        shape = self._shape = Shape(images, n, width, first.heads, hidden, first.windows.count)
        rows, tokens = shape.rows, shape.rows // batch
        codes, attended, inner = self._codes(rows, width), self._codes(rows, width), self._codes(rows, hidden)
        q_k_v = tuple(self._bytes(images, shape.heads, n, shape.head_dim) for _ in range(3))
        maps = self._bytes(images, shape.heads, n, n) if with_map else None
        order = [self._window_order(block.attention.windows) for block in blocks]
        self._norm(constants[0]["norm1"], x, codes, rows, width, constants[0]["qkv"], index=order[0][0])
        for i, (block, of) in enumerate(zip(blocks, constants, strict=True)):
            name = block.name
            self._tap_input(f"{name}.attn.qkv.input", codes, of["qkv"], images, n)
            self._heads(of, codes, q_k_v, name)
            self._attention(of, q_k_v, maps, attended)
            if maps is not None:
                self._tap(f"{name}.attn.map", maps, tuple(maps.shape), False)
            self._tap_input(f"{name}.attn.proj.input", attended, of["proj"], images, n)
            self._linear_norm(of["proj"], attended, x, x, None, (of["norm2"], of["fc1"]), codes, index=order[i][0])
            self._tap_input(f"{name}.mlp.fc1.input", codes, of["fc1"], batch, tokens)
            self._activation(of, codes, inner)
            self._tap_input(f"{name}.mlp.fc2.input", inner, of["fc2"], batch, tokens)
            if i + 1 < len(blocks):
                after, (gather, index) = constants[i + 1], order[i + 1]
                following = after["norm1"], after["qkv"]
                self._linear_norm(of["fc2"], inner, x, x, None, following, codes, index=index, gather=gather)
            else:
                self._linear_norm(of["fc2"], inner, x, x, None, None, codes)

    def _window_order(self, windows: Windows | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The row of the map of each row in the order of windows, and the inverse."""
        assert windows is not None
        key = windows.map, windows.size, windows.shift
        rows = self._index(key, partial(window_rows, windows, self.batch))
        return rows, self._index((key, "inverse"), lambda: np.argsort(rows.cpu().numpy()).astype(np.int32))

    def _index(self, key: Any, make: Callable[[], np.ndarray]) -> torch.Tensor:
        """Rows that a launch reads or writes, on the device; blocks of equal geometry share them."""
        if key not in self._indices:
            self._indices[key] = torch.from_numpy(make()).to(self._device)
        return self._indices[key]
