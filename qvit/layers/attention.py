"""Quantized multi-head self-attention: q, k, v and the softmax map at low bits, IRM on q and k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qvit.kernels import switch
from qvit.layers import exact
from qvit.layers.code_matmul import code_scores, code_values
from qvit.layers.linear import QuantLinear
from qvit.layers.rectify import Rectify
from qvit.quantizers.lsq import LSQQuantizer
from qvit.spec import Dims, Operand, PerToken, QuantSpec, SpecError


class QuantAttention(nn.Module):
    """Drop-in for `timm.layers.Attention`; takes over its parameters.

    Args:
        attention: the float module, with ``qkv`` and ``proj`` linear layers and no norm or gate inside.
        resolve: ``(suffix, operand) -> QuantSpec`` for the points ``qkv.weight``, ``qkv.input``, ``q``, ``k``, ``v``, ``map``,
            ``proj.weight``, ``proj.input``.
        tokens: N.
        rectify: insert IRM on q and k.
        statistical: of the weights of both linear layers; see `QuantLinear`.

    Attributes:
        tap: while set, called in every forward pass with q and k [B, H, N, D] as they enter their quantizers.
    """

    def __init__(
        self,
        attention: Any,
        resolve: Callable[[str, Operand], QuantSpec],
        tokens: int,
        rectify: bool,
        statistical: bool = False,
    ) -> None:
        super().__init__()
        self.tap: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self.num_heads, self.head_dim = attention.num_heads, attention.qkv.out_features // 3 // attention.num_heads
        self.scale = attention.scale
        width = Dims(channels=self.head_dim, rows=tokens, heads=self.num_heads)
        self.qkv = QuantLinear(
            attention.qkv, resolve("qkv.weight", Operand.WEIGHT), resolve("qkv.input", Operand.INPUT), tokens, statistical
        )
        self.rectify_q = Rectify(self.num_heads, self.head_dim) if rectify else nn.Identity()
        self.rectify_k = Rectify(self.num_heads, self.head_dim) if rectify else nn.Identity()
        self.q_quantizer = LSQQuantizer(resolve("q", Operand.QUERY), width)
        self.k_quantizer = LSQQuantizer(resolve("k", Operand.KEY), width)
        self.v_quantizer = LSQQuantizer(resolve("v", Operand.VALUE), width)
        map_dims = Dims(channels=tokens, rows=tokens, heads=self.num_heads)
        self.map_quantizer = LSQQuantizer(resolve("map", Operand.MAP), map_dims)
        self.attn_drop = attention.attn_drop
        self.proj = QuantLinear(
            attention.proj, resolve("proj.weight", Operand.WEIGHT), resolve("proj.input", Operand.INPUT), tokens, statistical
        )
        self.proj_drop = attention.proj_drop

    def rectified(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, N, C] -> q~, k~ (after IRM) and v, each [B, H, N, D]."""
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.rectify_q(q), self.rectify_k(k), v

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """x [B, N, C] -> [B, N, C].

        Raises:
            SpecError: a mask is given; classification transformers have none, and the integer engines run none.
        """
        if attn_mask is not None or is_causal:
            raise SpecError("Quantized attention takes no mask: run the model without attn_mask and is_causal.")
        if self._fuses(x):
            return self.proj_drop(self.proj(self._fused(x)))
        return self.attend(x)

    def attend(self, x: torch.Tensor, place: Callable[[torch.Tensor], torch.Tensor] | None = None) -> torch.Tensor:
        """x [B, N, C] -> [B, N, C] with the plain modules.

        Args:
            x: what enters qkv.
            place: scores [B, H, N, N] -> the same with what depends on the tokens' places alone, just before softmax.
        """
        b, n, _ = x.shape
        q, k, v = self.rectified(x)
        if self.tap is not None:
            self.tap(q, k)
        quantized = self.q_quantizer.enabled
        if quantized:
            scores = code_scores(self.q_quantizer(q), self.k_quantizer(k), self.scale)
        else:
            q, k = self.q_quantizer.observe(q), self.k_quantizer.observe(k)
            scores = q @ k.transpose(-2, -1) * self.scale
        if place is not None:
            scores = place(scores)
        if quantized:
            attention = self.attn_drop(exact.softmax(scores))
            out = code_values(self.map_quantizer(attention), self.v_quantizer(v))
        else:
            attention = self.attn_drop(scores.softmax(dim=-1))
            out = self.map_quantizer.observe(attention).to(v.dtype) @ self.v_quantizer.observe(v)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(b, n, -1)))

    def _fuses(self, x: torch.Tensor) -> bool:
        """Whether the fused kernels stand in for everything between qkv and proj: in a fused step, without scales a token."""
        if not (self.q_quantizer.enabled and switch.active(x)) or (self.training and self.attn_drop.p):
            return False
        return not any(isinstance(q.spec.scale, PerToken) for q in (self.q_quantizer, self.k_quantizer, self.map_quantizer))

    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, N, C] -> what enters proj [B, N, C], by `qvit.kernels`."""
        from qvit.kernels.attention import quantized_attention  # needs Triton

        codes, columns, map_scale = self._fused_operands(x)
        return quantized_attention(codes, columns, map_scale, self.num_heads, self.map_quantizer.spec.qp)

    def _fused_operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [B, N, C] -> codes of q, k and v [B, N, 3 H D], their `columns`, the map's scales [H]; taps q and k."""
        from qvit.kernels.rectify_quantize import Ranges, rectify_quantize  # needs Triton

        b, n, _ = x.shape
        quantizers = (self.q_quantizer, self.k_quantizer, self.v_quantizer)
        ranges = Ranges(*[bound for q in quantizers for bound in (q.spec.qn, q.spec.qp)])
        columns = self.columns()
        codes, q, k = rectify_quantize(
            self.qkv(x).to(switch.training_dtype(x.device)),
            columns,
            self.num_heads,
            self.rectify_q.eps if isinstance(self.rectify_q, Rectify) else None,
            ranges,
            keep=self.tap is not None,
        )
        if self.tap is not None:
            self.tap(*(part.view(b, n, self.num_heads, self.head_dim).transpose(1, 2) for part in (q, k)))
        map_scale, _ = self.map_quantizer.learned_parameters()
        return codes, columns, map_scale.flatten().expand(self.num_heads).contiguous()

    def columns(self) -> torch.Tensor:
        """Scale, offset, IRM's weight and IRM's bias of every channel of q, k and v, [4, 3 H D]."""
        shape = (self.num_heads, 1, self.head_dim)
        rows: list[list[torch.Tensor]] = [[], [], [], []]
        for quantizer, rectify in zip(
            (self.q_quantizer, self.k_quantizer, self.v_quantizer), (self.rectify_q, self.rectify_k, None), strict=True
        ):
            scale, offset = quantizer.learned_parameters()
            weight, bias = (rectify.weight, rectify.bias) if isinstance(rectify, Rectify) else (scale.new_ones(()), None)
            for row, part in zip(rows, (scale, offset, weight, bias), strict=True):
                part = scale.new_zeros(()) if part is None else part
                row.append((part[:, None] if part.dim() == 2 else part).expand(shape).reshape(-1))
        return torch.cat([part for row in rows for part in row]).view(4, -1)
