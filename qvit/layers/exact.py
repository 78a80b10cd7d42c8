"""Float steps that are the same on every device: LayerNorm, GELU, softmax and IRM's standardisation, evaluated in float64.

Two float32 implementations of one formula differ in the last bit, which flips a code in some 10^7; a low-bit network then makes
of one flipped code thousands. The integer model therefore defines these steps as the float32 nearest to the real value
(`qvit.engines.reference`). A student keeps to it wherever its codes are compared or its accuracy is measured: in float32
without gradients. Training steps compute as fast as they can.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm, activations
from torch import nn
from torch.nn import functional as F


def exact(x: torch.Tensor) -> bool:
    """Whether a step on ``x`` is evaluated in float64: no gradients, no autocast, and a device that has float64."""
    kind = x.device.type
    return x.dtype == torch.float32 and kind != "mps" and not (torch.is_grad_enabled() or torch.is_autocast_enabled(kind))


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension."""
    return x.double().softmax(dim=-1).float() if exact(x) else x.softmax(dim=-1)


def standardise(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Mean 0 and variance 1 over the last dimension, float32."""
    x = x.float()
    if exact(x):
        return F.layer_norm(x.double(), (x.shape[-1],), eps=eps).float()
    return F.layer_norm(x, (x.shape[-1],), eps=eps)


class _ExactNorm:
    """Mixed in before a LayerNorm class."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not exact(x):
            return super().forward(x)  # type: ignore[misc]
        return F.layer_norm(x.double(), self.normalized_shape, self.weight.double(), self.bias.double(), self.eps).float()


class _ExactActivation:
    """Mixed in before an activation class."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.double()).float() if exact(x) else super().forward(x)  # type: ignore[misc]


class _PlainNorm(_ExactNorm, nn.LayerNorm):
    pass


class _TimmNorm(_ExactNorm, LayerNorm):
    pass


class _PlainGELU(_ExactActivation, nn.GELU):
    pass


class _TimmGELU(_ExactActivation, activations.GELU):
    pass


class _GELUTanh(_ExactActivation, activations.GELUTanh):
    pass


class _QuickGELU(_ExactActivation, activations.QuickGELU):
    pass


_EXACT: dict[type, type] = {
    nn.LayerNorm: _PlainNorm,
    LayerNorm: _TimmNorm,
    nn.GELU: _PlainGELU,
    activations.GELU: _TimmGELU,
    activations.GELUTanh: _GELUTanh,
    activations.QuickGELU: _QuickGELU,
}


def make_exact(model: nn.Module) -> None:
    """Gives the LayerNorms and activations of a student, in place, their exact form."""
    for module in model.modules():
        if type(module) in _EXACT:
            module.__class__ = _EXACT[type(module)]
