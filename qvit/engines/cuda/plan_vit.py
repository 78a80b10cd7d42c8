"""The launches of a ViT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from qvit.architecture import VitArchitecture
from qvit.engines.cuda import constants as c
from qvit.engines.cuda.plan import Plan
from qvit.engines.cuda.row_chunks import Rows, chunk_rows, row_chunks
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
        # What comes out of the patch embedding is of the stream unless a norm follows.
        embedded = self._stream if constants.norm_pre is None else torch.float32
        first, x = self._floats(rows, width, embedded), self._floats(rows, width, self._stream)
        one_bit = self._bits(constants.blocks[0]["proj"]) is not None
        size = chunk_rows(width, one_bit, self._half, self._gpu.hopper, self._gpu.multiprocessors)
        self._row_chunks = row_chunks(rows, size)
        alone = None if self._all_tokens or self._averages(a) else constants.blocks[-1]  # computed for the heads alone
        for block in constants.blocks:
            if block is not alone:
                self._pack(block, {part.count for part in self._row_chunks})
        # Norms of chunks have launches of their own: a launch over all rows, as qkv's, does not make what each of them would.
        may_be_late = self._may_be_late
        self._may_be_late = may_be_late and len(self._row_chunks) == 1
        # Codes of fc2's input are written and read chunk by chunk, where they are not to be seen.
        self._hidden_again = not with_map
        most = max(part.count for part in self._row_chunks) if self._hidden_again else rows
        most = max(most, batch * len(a.heads))  # of the last block's, which are no chunks
        codes, attended, hidden = self._codes(rows, width), self._codes(rows, width), self._codes(most, a.mlp_hidden)
        normed = self._codes(rows, width) if with_map else codes  # seen when the next block's norm has followed
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
            if block is alone:
                self._for_heads_alone(block, name, (q, k, v), source, x, attended, codes, hidden)
                break
            self._heads(block, codes, (q, k, v), name)
            self._attention(block, (q, k, v), maps, attended)
            if maps is not None:
                self._tap(f"{name}.attn.map", maps, tuple(maps.shape), False)
            self._tap_input(f"{name}.attn.proj.input", attended, block["proj"], batch, n)
            after = constants.blocks[i + 1] if i + 1 < len(constants.blocks) else None
            following = None if after is None else (after["norm1"], after["qkv"])
            self._behind_attention(block, following, attended, source, x, normed, hidden, codes)
            self._tap_input(f"{name}.mlp.fc1.input", normed, block["fc1"], batch, n)
            self._tap_input(f"{name}.mlp.fc2.input", hidden, block["fc2"], batch, n)
            source = x
        self._may_be_late = may_be_late
        self._classify(x, a)

    def _for_heads_alone(
        self,
        block: dict[str, Any],
        name: str,
        q_k_v: tuple[torch.Tensor, ...],
        source: torch.Tensor,
        x: torch.Tensor,
        attended: torch.Tensor,
        codes: torch.Tensor,
        hidden: torch.Tensor,
    ) -> None:
        """The last block, behind keys and values of those tokens alone that the heads read: others reach nothing any more.

        Their rows lie one behind the other between the launches, and in ``x`` where they always are. Arguments: see
        `_behind_attention`; ``q_k_v`` as for `attention_launch`, ``codes`` are those of qkv's input, then of fc1's.
        """
        a, whole = self.model.architecture, self._shape
        shape = replace(whole, tokens=len(a.heads))
        rows, index = shape.rows, None
        if self.batch > 1:
            images, tokens = torch.arange(self.batch)[:, None], torch.arange(shape.tokens)
            index = (images * whole.tokens + tokens).reshape(-1).to(self._device, torch.int32)
        few = self._queries_apart(block, shape)
        self._heads(block, codes, q_k_v, name, (0, 3) if few is None else (1, 3))
        self._shape = shape
        if few is not None:
            self._norm(block["norm1"], source, codes, rows, whole.width, block["qkv"], index=index)
            self._heads(block, codes, q_k_v, name, (0, 1), few)
        self._pack(block, [rows])
        self._attention(block, q_k_v, None, attended, whole, few is not None)
        proj, fc2 = block["proj"], block["fc2"]
        self._linear(proj, attended, x, rows, residual=source, gamma=block["ls1"], index=index, tile=self._bits(proj, rows))
        self._norm(block["norm2"], x, codes, rows, whole.width, block["fc1"], index=index)
        self._activation(block, codes, hidden)
        self._linear(fc2, hidden, x, rows, residual=x, gamma=block["ls2"], index=index, tile=self._bits(fc2, rows))

    def _behind_attention(
        self,
        block: dict[str, Any],
        following: tuple[c.NormConstants, c.LinearConstants] | None,
        attended: torch.Tensor,
        source: torch.Tensor,
        x: torch.Tensor,
        normed: torch.Tensor,
        hidden: torch.Tensor,
        codes: torch.Tensor,
    ) -> None:
        """From proj to the next block's norm, if there is one: launches over all rows, or that take turns over chunks of them.

        Args:
            block: its constants, see `ModelConstants`.
            following: the next block's first norm, and what reads its codes.
            attended: codes of proj's input.
            source: what proj is added to, of the residual stream [rows, C].
            x: where the sum goes, and fc2 is added.
            normed: codes of fc1's input.
            hidden: codes of fc2's input; of one chunk, where they are written again and again.
            codes: for what follows.
        """

        def within(rows: Rows) -> Rows:
            return Rows(0, rows.count) if self._hidden_again else rows

        def fc1(rows: Rows) -> None:
            a, out = self._codes_of(normed, block["fc1"], rows), self._codes_of(hidden, block["fc2"], within(rows))
            self._activation(block, a, out, rows.count)

        behind_proj = block["norm2"], block["fc1"]
        launches = [
            *self._added("proj", block, "ls1", attended, source, x, behind_proj, normed, lambda rows: rows),
            fc1,
            *self._added("fc2", block, "ls2", hidden, x, x, following, codes, within),
        ]
        for rows in self._row_chunks:
            for launch in launches:
                launch(rows)

    def _added(
        self,
        name: str,
        block: dict[str, Any],
        scale: str,
        a: torch.Tensor,
        source: torch.Tensor,
        x: torch.Tensor,
        following: tuple[c.NormConstants, c.LinearConstants] | None,
        codes: torch.Tensor,
        of_a: Callable[[Rows], Rows],
    ) -> list[Callable[[Rows], None]]:
        """``x = source + scale * layer(a)`` and the norm that follows, of some rows; ``of_a`` is where they are in ``a``."""
        layer: c.LinearConstants = block[name]
        behind = self._norm_behind(layer, self._shape.rows) is not None

        def product(rows: Rows) -> None:
            out = codes if following is None else self._codes_of(codes, following[1], rows)
            self._linear_norm(
                layer,
                self._codes_of(a, layer, of_a(rows)),
                rows.floats(x),
                rows.floats(source),
                block[scale],
                following if behind else None,
                out,
                rows=rows.count,
            )

        def norm(rows: Rows) -> None:
            assert following is not None
            out = self._codes_of(codes, following[1], rows)
            self._norm(following[0], rows.floats(x), out, rows.count, x.shape[1], following[1])

        return [product] if behind or following is None else [product, norm]

    def _codes_of(self, memory: torch.Tensor, layer: c.LinearConstants, rows: Rows) -> torch.Tensor:
        """Codes that a layer of a block reads, from the first of some rows on."""
        return rows.codes(memory, self._chunks(layer))

    @staticmethod
    def _averages(a: VitArchitecture) -> bool:
        """Whether heads read an average of tokens; else head i reads token i."""
        return a.global_pool == "avg" and not a.dist_token

    def _classify(self, x: torch.Tensor, a: VitArchitecture) -> None:
        width = a.embed_dim
        apart = a.num_tokens * width
        if self._averages(a):
            x, apart = self._average(x, 0 if a.pool_include_prefix else a.num_prefix_tokens), width
        self._logits(x, apart)
