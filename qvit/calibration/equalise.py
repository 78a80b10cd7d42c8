"""Equalisation: moves the spread of activation channels into the weights, so that one scale a tensor serves all channels.

A per-channel factor r divides whatever produces an activation and multiplies the columns of the weight that consumes it; the
float function stays the same. r is the square root of the channels' standard deviation: half of the spread moves, since the
weight has to carry what the activation gives up (measured best in method.md, section 1).

Source: SmoothQuant (Xiao et al. 2023) and RepQ-ViT (Li et al. 2023) for LayerNorm-fed layers.
"""

from __future__ import annotations

import torch
from torch import nn

from qvit.layers.linear import QuantLinear

# A dead channel must not blow up the weight that reads it.
_LARGEST_FACTOR = 32.0


def factors_of(x: torch.Tensor) -> torch.Tensor:
    """x [.., C] -> r [C]: the square root of each channel's standard deviation, geometric mean 1."""
    std = x.float().flatten(0, -2).std(0)
    log = 0.5 * std.clamp_min(1e-8).log()
    return (log - log.mean()).exp().clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)


@torch.no_grad()
def equalise_norm(norm: nn.LayerNorm, linear: QuantLinear, r: torch.Tensor) -> None:
    """Divides a LayerNorm's output channels by r [K] and multiplies the columns of the weight [M, K] behind it."""
    norm.weight.div_(r)
    norm.bias.div_(r)
    linear.weight.mul_(r)


@torch.no_grad()
def equalise_values(qkv: QuantLinear, proj: QuantLinear, r: torch.Tensor) -> None:
    """Divides the rows of W_v (the last third of qkv's weight [3 C, C]) by r [C], multiplies the columns of W_proj [C, C].

    Attention mixes tokens and not channels, so the factor passes through it.
    """
    rows = slice(-r.numel(), None)
    qkv.weight[rows].div_(r[:, None])
    if qkv.bias is not None:
        qkv.bias[rows].div_(r)
    proj.weight.mul_(r)
