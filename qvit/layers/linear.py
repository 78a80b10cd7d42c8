"""Quantized linear layer: weight and input at low bits."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from qvit.layers.code_matmul import code_linear
from qvit.quantizers.lsq import LSQQuantizer
from qvit.quantizers.statsq import StatsQuantizer
from qvit.spec import Dims, PerGroup, QuantSpec, SpecError


class QuantLinear(nn.Module):
    """Drop-in for `torch.nn.Linear`; takes over its parameters.

    Args:
        linear: the float layer, weight [M, K].
        weight_spec, input_spec: how to quantize its operands.
        tokens: N, the number of tokens of its input; ``None`` where the input is [B, K].
        statistical: the weight's step follows from the weight (`StatsQuantizer`) instead of being learned.

    Raises:
        SpecError: weight and input both have group scales, of different sizes.
    """

    def __init__(
        self,
        linear: nn.Linear,
        weight_spec: QuantSpec,
        input_spec: QuantSpec,
        tokens: int | None,
        statistical: bool = False,
    ) -> None:
        super().__init__()
        both_grouped = isinstance(weight_spec.scale, PerGroup) and isinstance(input_spec.scale, PerGroup)
        if both_grouped and weight_spec.scale != input_spec.scale:
            raise SpecError("The groups of a weight and of its input must have one size: use the same PerGroup for both.")
        self.out_features, self.in_features = linear.weight.shape
        self.weight = linear.weight
        self.bias = linear.bias
        weight_quantizer = StatsQuantizer if statistical else LSQQuantizer
        self.weight_quantizer = weight_quantizer(weight_spec, Dims(channels=self.in_features, rows=self.out_features))
        self.input_quantizer = LSQQuantizer(input_spec, Dims(channels=self.in_features, rows=tokens))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., K] -> [.., M]."""
        if not self.input_quantizer.enabled:
            return F.linear(self.input_quantizer.observe(x), self.weight, self.bias)
        if not self.weight_quantizer.enabled:
            return F.linear(self.input_quantizer(x).value, self.weight, self.bias)
        return code_linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
