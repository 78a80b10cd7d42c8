"""Float steps that are the same on every device: LayerNorm, softmax, GELU and IRM's standardisation, evaluated in float64.

Two float32 implementations of one formula differ in the last bit, which flips a code in some 10^7; a low-bit network then makes
of one flipped code thousands. An integer model therefore defines these steps as the float32 nearest to the real value. The
reference engine and the plain path of the student share these functions; the CPU engine decides in float64 where float32 is in
doubt (`qvit/engines/cpu/src/ops`).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """Over the last dimension, float32 [.., C]."""
    return F.layer_norm(x.double(), (x.shape[-1],), weight.double(), bias.double(), eps).float()


def standardise(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Mean 0 and variance 1 over the last dimension, float32."""
    return F.layer_norm(x.double(), (x.shape[-1],), eps=eps).float()


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, float32."""
    return x.double().softmax(dim=-1).float()


def activation(x: torch.Tensor, name: str) -> torch.Tensor:
    """``gelu``, ``gelu_tanh`` or ``quick_gelu`` (`qvit.architecture.VitArchitecture`), float32."""
    wide = x.double()
    if name == "quick_gelu":
        return (wide * torch.sigmoid(1.702 * wide)).float()
    return F.gelu(wide, approximate="tanh" if name == "gelu_tanh" else "none").float()
