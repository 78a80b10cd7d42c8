"""The quantized MLP of a transformer block."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qvit.layers.linear import QuantLinear


class QuantMlp(nn.Module):
    """Drop-in for `timm.layers.Mlp` without a norm inside; takes over its activation and its dropouts.

    Args:
        mlp: the float module.
        fc1, fc2: its layers, quantized.
        activation: the name of its activation, as in `qvit.architecture.VitArchitecture`.
    """

    def __init__(self, mlp: Any, fc1: QuantLinear, fc2: QuantLinear, activation: str) -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = fc1
        self.act = mlp.act
        self.drop1 = mlp.drop1
        self.fc2 = fc2
        self.drop2 = mlp.drop2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, N, C] -> [B, N, C]."""
        x = self.fc1(x)
        # A fused step computes the activation in front of fc2's quantizer and never writes it to memory.
        if self.fc2.fuses(x) and not (self.training and self.drop1.p):
            return self.drop2(self.fc2.fused(x, self.activation))
        return self.drop2(self.fc2(self.drop1(self.act(x))))
