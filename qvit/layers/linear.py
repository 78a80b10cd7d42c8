"""Quantized linear layer: weight and input at low bits."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from qvit.kernels import switch
from qvit.layers.code_matmul import code_linear
from qvit.quantizers.lsq import SMALLEST_SCALE, LSQQuantizer
from qvit.quantizers.statsq import StatsQuantizer
from qvit.spec import Dims, HalfStep, PerGroup, PerTensor, QuantSpec, SpecError


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

    def fuses(self, x: torch.Tensor) -> bool:
        """Whether `fused` stands in for the plain modules now: in a fused step, with one scale for the whole input."""
        return self.input_quantizer.enabled and isinstance(self.input_quantizer.spec.scale, PerTensor) and switch.active(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [.., K] -> [.., M]."""
        if self.fuses(x):
            return self.fused(x, "none")
        if not self.input_quantizer.enabled:
            weight = self.weight_quantizer(self.weight).value if self.weight_quantizer.enabled else self.weight
            return F.linear(self.input_quantizer.observe(x), weight, self.bias)
        if not self.weight_quantizer.enabled:
            return F.linear(self.input_quantizer(x).value, self.weight, self.bias)
        return code_linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)

    def fused(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """``forward(activation(x))`` with the kernel of `qvit.kernels.linear`; ``activation`` by name, or ``none``."""
        from qvit.kernels.linear import quantized_linear  # needs Triton

        quantizer = self.input_quantizer
        scale, offset = quantizer.learned_parameters()
        offset = scale.new_zeros(self.in_features) if offset is None else offset.expand(self.in_features)
        qn, qp = quantizer.spec.qn, quantizer.spec.qp
        dtype = switch.training_dtype(x.device)
        weight = self._fused_weight(dtype)
        return quantized_linear(x, scale, offset.contiguous(), weight, self.bias, qn, qp, activation, dtype)

    def _fused_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight's values [M, K], by `qvit.kernels.weight_quantize` where its scale is a row's or the whole weight's."""
        quantizer = self.weight_quantizer
        if not quantizer.enabled:
            return self.weight
        if not isinstance(quantizer, LSQQuantizer) or isinstance(quantizer.spec.scale, PerGroup):
            return quantizer(self.weight).value
        from qvit.kernels.weight_quantize import quantize_weight  # needs Triton

        quantizer.check_calibrated()
        spec = quantizer.spec
        half_step = isinstance(spec.offset, HalfStep)
        return quantize_weight(
            self.weight, quantizer.scale, spec.qn, spec.qp, half_step, SMALLEST_SCALE, quantizer.grad_factor, dtype
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
