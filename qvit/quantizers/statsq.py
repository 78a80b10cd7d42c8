"""StatsQ: a weight quantizer whose step follows from the weights, so that no learned step makes them oscillate.

    s = 2 * mean |W|        what shares a step (an output channel), from the weights as they are in every forward pass
    step = s / 2^(b-1)      rounded to float16, in training as in the file
    c = clamp(round(W / step - 1/2), -2^(b-1), 2^(b-1) - 1)        value = step * (c + 1/2)

The levels lie at odd multiples of half a step, symmetric around zero: on integers, 2 c + 1. The gradient is passed straight
through, also where the code was clamped; the step gets none.

Source: Liu et al., "Oscillation-free Quantization for Low-bit Vision Transformers" (OFQ), ICML 2023.
"""

from __future__ import annotations

import torch
from torch import nn

from qvit.errors import SpecError
from qvit.quantizers.lsq import Quantized
from qvit.spec import Dims, HalfStep, Operand, PerTensor, QuantSpec

# The range in which float16 has its full precision; a step never leaves it.
_SMALLEST_STEP, _LARGEST_STEP = 2.0**-14, 65504.0


def statistical_step(weight: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """weight [M, K] -> step float32 [M, 1] or, per tensor, [1]; every value is one that float16 holds.

    The mean is taken in float64, so that a device or the order of a sum does not decide to which float16 value it is rounded.
    """
    dims = (0, 1) if isinstance(spec.scale, PerTensor) else 1
    mean = weight.detach().abs().mean(dims, keepdim=True, dtype=torch.float64)
    step = (mean * (2 / -spec.qn)).clamp(_SMALLEST_STEP, _LARGEST_STEP).half().float()
    return step.reshape(1) if isinstance(spec.scale, PerTensor) else step


def _forward(
    weight: torch.Tensor, step: torch.Tensor, qn: int, qp: int, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    codes = (weight.to(step.dtype) / step - 0.5).round().clamp(qn, qp)
    return ((codes + 0.5) * step).to(out_dtype), codes.to(out_dtype)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, step, qn, qp, out_dtype):  # type: ignore[override]
        value, codes = _forward(weight, step, qn, qp, out_dtype)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(codes)
        return value, codes

    @staticmethod
    def backward(ctx, grad_value, _grad_codes):  # type: ignore[override]
        return grad_value.to(ctx.dtype), None, None, None, None


class StatsQuantizer(nn.Module):
    """A weight quantizer without parameters; there is nothing to calibrate.

    Args:
        spec: of a weight, with a half-step offset.
        dims: extents of the weight.

    Attributes:
        enabled: if false, the layer's weight stays in floating point (`qvit.layers.points`).

    Raises:
        SpecError: the spec is not one of a weight with a half-step offset.
    """

    def __init__(self, spec: QuantSpec, dims: Dims) -> None:
        super().__init__()
        if spec.operand is not Operand.WEIGHT or not isinstance(spec.offset, HalfStep):
            raise SpecError("StatsQ quantizes weights with levels at odd half steps: use offset=HalfStep().")
        self.spec, self.dims = spec, dims
        self.enabled = True

    def forward(self, weight: torch.Tensor) -> Quantized:
        """weight [M, K] -> the same shape, quantized."""
        step = statistical_step(weight, self.spec)
        device = weight.device.type
        out_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else step.dtype
        with torch.autocast(device, enabled=False):
            value, codes = _StraightThrough.apply(weight, step, self.spec.qn, self.spec.qp, out_dtype)
        return Quantized(value, codes, step, step * 0.5, self.spec)

    def extra_repr(self) -> str:
        return f"{self.spec.operand.value}: {self.spec.bits} bit, StatsQ, scale={self.spec.scale}"
