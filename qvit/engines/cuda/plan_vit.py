"""The launches of a ViT."""

from __future__ import annotations

import torch

from qvit.architecture import VitArchitecture
from qvit.engines.cuda.plan import Plan
from qvit.engines.cuda.shape import Shape


class VitPlan(Plan):
    """All launches of a forward pass of a ViT or DeiT; see `Plan`."""

    def _build(self, with_map: bool) -> None:
        """Makes `steps`."""
        a, constants, batch = self.model.architecture, self.constants, self.batch
        assert isinstance(a, VitArchitecture)
        assert constants.embed is not None
        self._shape = Shape(batch, a.num_tokens, a.embed_dim, a.num_heads, a.mlp_hidden)
        rows, n, width = batch * a.num_tokens, a.num_tokens, a.embed_dim
        first, x = self._floats(rows, width), self._floats(rows, width)
        codes, attended, hidden = self._codes(rows, width), self._codes(rows, width), self._codes(rows, a.mlp_hidden)
        q, k, v = (self._bytes(batch, a.num_heads, n, a.head_dim) for _ in range(3))
        maps = self._bytes(batch, a.num_heads, n, n) if with_map else None

        prefix = a.num_prefix_tokens
        first.view(batch, n, width)[:, :prefix] = constants.embed[:prefix]
        self._linear(
            constants.patch,
            self._patches,
            first,
            rows=batch * a.num_patches,
            position=constants.embed,
            rows_in=a.num_patches,
            rows_out=n,
            row_first=prefix,
        )
        source = first
        if constants.norm_pre is not None:
            self._norm(constants.norm_pre, first, x, rows, width, width)
            source = x
        for i, block in enumerate(constants.blocks):
            name = f"blocks.{i}"
            if i == 0:
                self._norm(block["norm1"], source, codes, rows, width, block["qkv"])
            self._tap_input(f"{name}.attn.qkv.input", codes, block["qkv"], batch, n)
            self._heads(block, codes, (q, k, v), name)
            self._attention(block, (q, k, v), maps, attended)
            if maps is not None:
                self._tap(f"{name}.attn.map", maps, tuple(maps.shape), False)
            self._tap_input(f"{name}.attn.proj.input", attended, block["proj"], batch, n)
            self._linear_norm(block["proj"], attended, x, source, block["ls1"], (block["norm2"], block["fc1"]), codes)
            self._tap_input(f"{name}.mlp.fc1.input", codes, block["fc1"], batch, n)
            self._activation(block, codes, hidden)
            self._tap_input(f"{name}.mlp.fc2.input", hidden, block["fc2"], batch, n)
            after = constants.blocks[i + 1] if i + 1 < len(constants.blocks) else None
            following = None if after is None else (after["norm1"], after["qkv"])
            self._linear_norm(block["fc2"], hidden, x, x, block["ls2"], following, codes)
            source = x
        self._classify(source, a)

    def _classify(self, x: torch.Tensor, a: VitArchitecture) -> None:
        width = a.embed_dim
        apart = a.num_tokens * width
        if a.global_pool == "avg" and not a.dist_token:
            x, apart = self._average(x, 0 if a.pool_include_prefix else a.num_prefix_tokens), width
        self._logits(x, apart)
