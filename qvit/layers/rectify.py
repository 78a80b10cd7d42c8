"""IRM, the information rectification module: q and k are reshaped so that their codes carry the most information."""

from __future__ import annotations

import torch
from torch import nn

from qvit.layers import exact


class Rectify(nn.Module):
    """Standardises every token of every head over the head width, then scales and shifts each channel.

    ``x~ = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias``, with mean and variance over D. The paper writes the affine
    part as ``(x - mean + beta) / (gamma * sqrt(var + eps))``: ``weight = 1 / gamma``, and a shift after the division instead
    of before it, which holds a token's q still whatever its variance.

    It stays at inference, since mean and variance depend on the image. `qvit.calibrate` sets weight and bias so that the
    pretrained function is kept (`qvit.calibration.rectify_init`).

    Args:
        heads: H.
        head_dim: D.

    Source: Li et al., "Q-ViT", NeurIPS 2022, section 3.2, equations 2.19 to 2.21 of the book chapter.
    """

    def __init__(self, heads: int, head_dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def standardise(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, N, D] -> the same, each row with mean 0 and variance 1 over D, float32."""
        return exact.standardise(x, self.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, N, D] -> the same shape, float32."""
        return self.standardise(x) * self.weight[:, None] + self.bias[:, None]
