"""A linear layer on codes: quantize the input, one matrix product, everything else folded into its operands.

    y = (scale * codes + offset) w^T + bias = codes (scale * w)^T + (w offset + bias)

The codes are an exact operand; scale is folded into the weight and offset into the bias, so that no pass over y is needed.
Plain counterpart: `qvit.layers.code_matmul.code_linear` behind an `LSQQuantizer`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from qvit.kernels.input_quantize import quantize_input, quantize_input_backward
from qvit.kernels.linear_operands import column_sums, fold, unfold


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, offset, weight, bias, qn, qp, kind, dtype):  # type: ignore[override]
        x, weight = x.contiguous(), weight.to(dtype)
        codes = quantize_input(x, scale, offset, qn, qp, kind, dtype)
        operand, shift = fold(weight, scale, offset, bias)
        ctx.save_for_backward(x, scale, offset, weight, codes)
        ctx.arguments = (qn, qp, kind)
        ctx.has_bias = bias is not None
        return F.linear(codes, operand, shift)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, scale, offset, weight, codes = ctx.saved_tensors
        rows = grad.to(weight.dtype).reshape(-1, grad.shape[-1]).contiguous()
        sums = column_sums(rows)
        grad_codes = rows @ weight
        grad_x, grad_scale, grad_offset = quantize_input_backward(grad_codes, x, scale, offset, *ctx.arguments)
        products = rows.t() @ codes.reshape(-1, codes.shape[-1])
        grad_weight = unfold(products, scale, offset, sums)
        return grad_x, grad_scale, grad_offset, grad_weight, sums if ctx.has_bias else None, *[None] * 4


def quantized_linear(
    x: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    qn: int,
    qp: int,
    kind: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``quantize(activation(x)) weight^T + bias``.

    Args:
        x: [.., K], floating point.
        scale, offset: of its quantizer, float32 [1] and [K].
        weight: [M, K], dequantized values.
        bias: [M] or ``None``.
        qn, qp: smallest and largest code of the input.
        kind: of `qvit.kernels.arithmetic.activation`, in front of the quantizer.
        dtype: of the matrix product's operands and result.

    Returns:
        [.., M]. Gradients reach x, scale, offset, weight and bias.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _QuantizedLinear.apply(x, scale, offset, weight, bias, qn, qp, kind, dtype)
