"""Quantizing a weight with learned steps: one pass forward, one pass backward, in place of some twenty small ones a layer.

Plain counterpart: `qvit.quantizers.lsq.LSQQuantizer` on a weight. With ``v = w / scale - h`` and h one half where levels lie at
half steps, else 0, the value is ``scale (code + h)``. The gradient of the scale is the sum over what shares it of

    g (code - v)    where v lies in the range        g (code + h)    where it does not
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qvit.kernels.arithmetic import round_half_even

_ROWS, _COLUMNS = 4, 1024  # a tile; a program has whole rows


@triton.jit
def _code(w, scale, half, qn, qp):
    # Divided and rounded as PyTorch does: the codes are those of the plain quantizer.
    scales = w * 0.0 + scale
    v = tl.math.div_rn(w - half * scales, scales)
    return v, round_half_even(tl.minimum(tl.maximum(v, qn), qp))


@triton.jit
def _quantize_weight(
    w_ptr, scale_ptr, value_ptr, rows, columns, scale_stride, qn, qp, half, smallest, R: tl.constexpr, C: tl.constexpr
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    scale = tl.maximum(tl.load(scale_ptr + r * scale_stride, mask=r < rows, other=1.0), smallest)[:, None]
    first = r.to(tl.int64)[:, None] * columns
    for start in range(0, columns, C):
        c = start + tl.arange(0, C)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        w = tl.load(w_ptr + first + c[None, :], mask=mask, other=0.0).to(tl.float32)
        _, code = _code(w, scale, half, qn, qp)
        tl.store(value_ptr + first + c[None, :], ((code + half) * scale).to(value_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_weight_backward(
    grad_ptr,
    w_ptr,
    scale_ptr,
    grad_w_ptr,
    grad_scale_ptr,
    rows,
    columns,
    scale_stride,
    qn,
    qp,
    half,
    smallest,
    factor,
    R: tl.constexpr,
    C: tl.constexpr,
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    scale = tl.maximum(tl.load(scale_ptr + r * scale_stride, mask=r < rows, other=1.0), smallest)[:, None]
    first = r.to(tl.int64)[:, None] * columns
    sums = tl.zeros((R, C), tl.float32)
    for start in range(0, columns, C):
        c = start + tl.arange(0, C)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        w = tl.load(w_ptr + first + c[None, :], mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + first + c[None, :], mask=mask, other=0.0).to(tl.float32)
        v, code = _code(w, scale, half, qn, qp)
        inside = (v >= qn) & (v <= qp)
        sums += grad * tl.where(inside, code - v, code + half)
        tl.store(grad_w_ptr + first + c[None, :], tl.where(inside, grad, 0.0).to(grad_w_ptr.dtype.element_ty), mask=mask)
    tl.store(grad_scale_ptr + r, tl.sum(sums, 1) * factor, mask=r < rows)


class _QuantizedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, scale, qn, qp, half, smallest, factor, dtype):  # type: ignore[override]
        weight, scale = weight.contiguous(), scale.contiguous()
        rows, columns = weight.shape
        value = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        arguments = (rows, columns, int(scale.numel() > 1), qn, qp, half, smallest)
        ctx.grid, ctx.tile = (triton.cdiv(rows, _ROWS),), {"R": _ROWS, "C": min(triton.next_power_of_2(columns), _COLUMNS)}
        _quantize_weight[ctx.grid](weight, scale, value, *arguments, **ctx.tile)
        ctx.save_for_backward(weight, scale)
        ctx.arguments = (*arguments, factor)
        return value

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        weight, scale = ctx.saved_tensors
        grad_weight = torch.empty_like(weight)
        grad_scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
        _quantize_weight_backward[ctx.grid](
            grad.contiguous(), weight, scale, grad_weight, grad_scale, *ctx.arguments, **ctx.tile
        )
        return grad_weight, grad_scale.view(-1, 1).sum_to_size(scale.shape), *[None] * 6


def quantize_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    qn: int,
    qp: int,
    half_step: bool,
    smallest: float,
    factor: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The values of a quantized weight.

    Args:
        weight: [M, K].
        scale: float32 [M, 1], or [1] for the whole weight.
        qn, qp: smallest and largest code.
        half_step: levels lie at odd multiples of half a step.
        smallest: scale that a smaller one counts as; the gradient passes all the same.
        factor: multiplies the gradient of the scale.
        dtype: of the values.

    Returns:
        [M, K]. Gradients reach weight and scale.
    """
    with torch.autocast(weight.device.type, enabled=False):
        return _QuantizedWeight.apply(weight, scale, qn, qp, 0.5 if half_step else 0.0, smallest, factor, dtype)
