"""Confidence-guided annealing: near the end of training, weights that are sure of their code stay as they are.

A weight that lies far from every rounding threshold has settled; one that lies on a threshold is still being decided. In the
last part of a run only those within ``width`` steps of a threshold may move. Which ones is asked anew in every step, so that a
weight that has left the thresholds is settled as well. All others are put back after the optimizer's step, bit for bit,
whatever momentum or weight decay did to them; and so are learned weight scales, since moving them moves all thresholds.

There is no state: what happens in a step follows from the weights before it, so a run resumes exactly.

Source: Liu et al., "Oscillation-free Quantization for Low-bit Vision Transformers" (OFQ), ICML 2023.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qvit.layers.weights import distance_to_threshold, quantized_weights


class Annealing:
    """Holds settled weights of a quantized model.

    Args:
        model: quantized and calibrated.
        width: distance to a rounding threshold, in steps, within which a weight may move.
    """

    def __init__(self, model: nn.Module, width: float) -> None:
        self.weights, self.width = quantized_weights(model), width
        self.scales = [weight.scale for weight in self.weights if weight.scale is not None]

    @contextmanager
    @torch.no_grad()
    def holding(self) -> Iterator[None]:
        """Around an optimizer's step: what may not move is as before when it ends."""
        scales = [scale.clone() for scale in self.scales]
        settled = []
        for weight in self.weights:
            far = distance_to_threshold(weight.effective(), weight.quantized()) > self.width
            settled.append((weight.parameter, far.view_as(weight.parameter), weight.parameter.clone()))
        yield
        for parameter, far, before in settled:
            torch.where(far, before, parameter, out=parameter.data)
        for scale, before in zip(self.scales, scales, strict=True):
            scale.copy_(before)
