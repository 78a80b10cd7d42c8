"""The quantized weights of a model, for what looks at all of them: annealing, regularisation, calibration anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qvit.layers.linear import QuantLinear
from qvit.layers.patch_embed import QuantPatchProjection
from qvit.quantizers.lsq import LSQQuantizer, Quantized, repeat_groups
from qvit.spec import HalfStep


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight and its quantizer.

    Attributes:
        name: of the layer.
        layer: that holds both.
    """

    name: str
    layer: QuantLinear | QuantPatchProjection

    @property
    def parameter(self) -> torch.Tensor:
        """What is trained; its shape is [M, K], or [M, C, ph, pw] in a patch projection."""
        return self.layer.weight

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.layer.weight_quantizer.spec.bits

    @property
    def scale(self) -> nn.Parameter | None:
        """The learned steps, if they are learned."""
        quantizer = self.layer.weight_quantizer
        return quantizer.scale if isinstance(quantizer, LSQQuantizer) else None

    def effective(self) -> torch.Tensor:
        """What is quantized, [M, K]."""
        return self.layer.effective_weight() if isinstance(self.layer, QuantPatchProjection) else self.layer.weight

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """The weight quantized as it is, without gradient."""
        return self.layer.weight_quantizer(self.effective())


def quantized_weights(model: nn.Module) -> list[QuantizedWeight]:
    """All quantized weights, in the order of the model's modules; an empty list for a float model."""
    return [
        QuantizedWeight(name, module)
        for name, module in model.named_modules()
        if isinstance(module, (QuantLinear, QuantPatchProjection))
    ]


def distance_to_threshold(weight: torch.Tensor, quantized: Quantized) -> torch.Tensor:
    """How far each weight [M, K] lies from the nearest value at which its code changes, in steps.

    A weight that is clamped counts its distance to the outermost threshold.
    """
    spec = quantized.spec
    ratio = weight.float() / repeat_groups(quantized.scale, spec) - (0.5 if isinstance(spec.offset, HalfStep) else 0.0)
    return (ratio - ratio.floor().clamp(spec.qn, spec.qp - 1) - 0.5).abs()
