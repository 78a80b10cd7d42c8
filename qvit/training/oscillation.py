"""Oscillation regularisation: pulls weights towards their quantized values, so that they stop crossing thresholds.

Of every weight W of at most four bits, with the differences d = W - W^ to its quantized values,

    penalty = || d || + sum over codes c of the variance of d among the weights whose code is c

with codes and quantized values held constant. The norm, as in the source, and not its square: its gradient has length one
whatever the layer's size, next to a task's gradient that is clipped to one; that of a mean of squares is four orders of
magnitude smaller and moves nothing.

The gradient is in closed form and added after backward, so nothing is kept for autograd. One pass over the weights, without
waiting for the device.

Source: Huang et al., "Quantization Variation: A New Perspective on Training Transformers with Low-Bit Precision" (VVTQ), 2023.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from qvit.layers.weights import quantized_weights

_MOST_BITS = 4
_TINY = 1e-12


def penalty_weight(step: int, total_steps: int, weight: float, start: float) -> float:
    """Of a step counted from 0: 0 up to the share ``start`` of the run, then half a cosine up to ``weight`` at its end."""
    progress = (step / total_steps - start) / (1 - start)
    return weight * 0.5 * (1 - math.cos(math.pi * progress)) if progress > 0 else 0.0


def _penalty(
    weight: torch.Tensor, value: torch.Tensor, codes: torch.Tensor, levels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The penalty (a scalar) of one weight [M, K] and its gradient [M, K]; ``levels`` [codes] are all codes there are."""
    d = weight - value
    norm = d.square().sum().sqrt()
    flat = d.flatten()
    member = (codes.flatten()[None] == levels[:, None]).to(d.dtype)
    count = member.sum(1).clamp_min(1)
    mean = (member * flat).sum(1) / count
    variance = (member * (flat - mean[:, None]).square()).sum(1) / count
    own = (codes - levels[0]).long()
    return norm + variance.sum(), d / norm.clamp_min(_TINY) + 2 * (d - mean[own]) / count[own]


class OscillationPenalty:
    """The penalty of a quantized model.

    Args:
        model: quantized and calibrated.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = [weight for weight in quantized_weights(model) if weight.bits <= _MOST_BITS]

    @torch.no_grad()
    def add_gradients(self, factor: float) -> torch.Tensor:
        """Adds ``factor`` times the gradient of the penalty to the weights' gradients; returns the penalty, a scalar."""
        total: torch.Tensor | None = None
        for weight in self.weights:
            quantized = weight.quantized()
            spec = quantized.spec
            levels = torch.arange(spec.qn, spec.qp + 1, device=quantized.codes.device, dtype=quantized.codes.dtype)
            penalty, gradient = _penalty(weight.effective(), quantized.value, quantized.codes, levels)
            parameter = weight.parameter
            if parameter.grad is not None:
                parameter.grad.add_(gradient.view_as(parameter), alpha=factor)
            total = penalty if total is None else total + penalty
        return torch.zeros(()) if total is None else total
