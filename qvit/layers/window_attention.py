"""Quantized attention within windows: relative position bias and shift mask are added to the scores of quantized q and k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qvit.layers.attention import QuantAttention
from qvit.spec import Operand, QuantSpec


class QuantWindowAttention(QuantAttention):
    """Drop-in for timm's `WindowAttention` of Swin; takes over its parameters. A window counts as an image of its own.

    In quantized form the scores are those of `code_scores`, plus the bias, plus the mask, each sum rounded to float32, as the
    engines compute them (`qvit.integer.ops.Windows`).

    In a fused step, windows of up to 64 tokens have kernels of their own (`qvit.kernels.window_attention`); larger ones run the
    plain modules between qkv and proj.

    Args:
        attention: the float module, with ``relative_position_bias_table`` [(2 h - 1) (2 w - 1), H].
        resolve, rectify, statistical: as in `QuantAttention`; no spec may have a scale per token.
    """

    def __init__(
        self, attention: Any, resolve: Callable[[str, Operand], QuantSpec], rectify: bool, statistical: bool = False
    ) -> None:
        super().__init__(attention, resolve, attention.window_area, rectify, statistical)
        self.window_area = attention.window_area
        self.relative_position_bias_table = attention.relative_position_bias_table
        self.relative_position_index: torch.Tensor
        self.register_buffer("relative_position_index", attention.relative_position_index, persistent=False)

    def position_bias(self) -> torch.Tensor:
        """The relative position bias [H, N, N], queries by keys."""
        table: nn.Parameter = self.relative_position_bias_table
        rows = table[self.relative_position_index.flatten()]
        return rows.view(self.window_area, self.window_area, -1).permute(2, 0, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:  # type: ignore[override]
        """Windows x [B W, N, C] -> [B W, N, C].

        Args:
            x: the windows of an image one behind the other.
            mask: [W, N, N], 0 or -100; ``None`` where windows are not shifted.
        """
        if self._fuses(x):
            return self.proj_drop(self.proj(self._fused_in_windows(x, mask)))

        def place(scores: torch.Tensor) -> torch.Tensor:
            scores = scores + self.position_bias()
            if mask is None:
                return scores
            return (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)

        return self.attend(x, place)

    def _fuses(self, x: torch.Tensor) -> bool:
        if not super()._fuses(x):
            return False
        from qvit.kernels.window_attention import MOST_TOKENS  # needs Triton

        return self.window_area <= MOST_TOKENS

    def _fused_in_windows(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Windows x [B W, N, C] -> what enters proj [B W, N, C], by `qvit.kernels`."""
        from qvit.kernels.window_attention import quantized_window_attention  # needs Triton

        codes, columns, map_scale = self._fused_operands(x)
        bias = self.position_bias()
        return quantized_window_attention(codes, columns, map_scale, bias, mask, self.map_quantizer.spec.qp)
