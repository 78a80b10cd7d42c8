"""Where a student keeps to the exact float steps (`qvit.quantizers.exact_float`): in float32, without gradients.

There its codes are compared and its accuracy is measured. Training steps, and evaluation under autocast, compute as fast as
they can.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import LayerNorm, activations
from torch import nn
from torch.nn import functional as F

from qvit.quantizers import exact_float


def exact(x: torch.Tensor) -> bool:
    """Whether a step on ``x`` is evaluated in float64: no gradients, no autocast, and a device that has float64."""
    kind = x.device.type
    return x.dtype == torch.float32 and kind != "mps" and not (torch.is_grad_enabled() or torch.is_autocast_enabled(kind))


def softmax(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension."""
    return exact_float.softmax(x) if exact(x) else x.softmax(dim=-1)


def standardise(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Mean 0 and variance 1 over the last dimension, float32."""
    x = x.float()
    return exact_float.standardise(x, eps) if exact(x) else F.layer_norm(x, (x.shape[-1],), eps=eps)


class _ExactNorm:
    """Mixed in before a LayerNorm class."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not exact(x):
            return super().forward(x)  # type: ignore[misc]
        return exact_float.layer_norm(x, self.weight, self.bias, self.eps)


class _ExactActivation:
    """Mixed in before an activation class."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return exact_float.activation(x, self.exact_name) if exact(x) else super().forward(x)  # type: ignore[misc]


class _PlainNorm(_ExactNorm, nn.LayerNorm):
    pass


class _TimmNorm(_ExactNorm, LayerNorm):
    pass


class _PlainGELU(_ExactActivation, nn.GELU):
    @property
    def exact_name(self) -> str:
        return "gelu_tanh" if self.approximate == "tanh" else "gelu"


class _TimmGELU(_ExactActivation, activations.GELU):
    exact_name = "gelu"


class _GELUTanh(_ExactActivation, activations.GELUTanh):
    exact_name = "gelu_tanh"


class _QuickGELU(_ExactActivation, activations.QuickGELU):
    exact_name = "quick_gelu"


class MapAverage(nn.Module):
    """The average over the places of a map: [B, H, W, C] -> [B, C], float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().mean((1, 2)).float() if exact(x) else x.mean((1, 2))


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
