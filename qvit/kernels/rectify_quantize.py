"""From what qkv gives to codes of q, k and v: IRM on q and k, then quantization, one pass forward, one pass backward.

Plain counterpart: `qvit.layers.rectify.Rectify` and the three `LSQQuantizer`s of `qvit.layers.attention.QuantAttention`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from qvit.kernels.arithmetic import quantize

_NUMBERS = 512  # a tile: 8 rows of heads of 64 channels; narrower heads get more rows, so that no program has too little to do
_TILES_A_PROGRAM = 32  # of the backward pass, whose sums over rows stay in registers


class Ranges(NamedTuple):
    """Smallest and largest codes of q, k and v."""

    qn_q: int
    qp_q: int
    qn_k: int
    qp_k: int
    qn_v: int
    qp_v: int


@triton.jit
def _standardise(x, mask, eps, D: tl.constexpr):
    """x [R, DP] -> (each row with mean 0 and variance 1 over its D channels, 1 / its standard deviation)."""
    centred = tl.where(mask, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def _bound(part, of_q, of_k, of_v):
    return tl.where(part == 0, of_q, tl.where(part == 1, of_k, of_v)).to(tl.float32)


@triton.jit
def _rectify_quantize(
    qkv_ptr,
    columns_ptr,
    codes_ptr,
    rectified_ptr,
    rows,
    heads,
    eps,
    qn_q,
    qp_q,
    qn_k,
    qp_k,
    qn_v,
    qp_v,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    RECTIFY: tl.constexpr,
    KEEP: tl.constexpr,
):
    part, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    width = 3 * heads * D
    d = tl.arange(0, DP)
    column = tl.program_id(1) * D + d
    start = tl.program_id(0) * R
    r = tl.arange(0, R)
    mask = (start + r < rows)[:, None] & (d < D)[None, :]
    first = start.to(tl.int64) * width
    where = r[:, None] * width + column[None, :]
    y = tl.load(qkv_ptr + first + where, mask=mask, other=0.0).to(tl.float32)
    if RECTIFY:
        if part < 2:
            z, _ = _standardise(y, mask, eps, D)
            weight = tl.load(columns_ptr + 2 * width + column, mask=d < D, other=0.0)
            y = z * weight[None, :] + tl.load(columns_ptr + 3 * width + column, mask=d < D, other=0.0)[None, :]
    inverse_scale = 1.0 / tl.load(columns_ptr + column, mask=d < D, other=1.0)[None, :]
    offset = tl.load(columns_ptr + width + column, mask=d < D, other=0.0)[None, :]
    _, code, _ = quantize(y, inverse_scale, offset, _bound(part, qn_q, qn_k, qn_v), _bound(part, qp_q, qp_k, qp_v))
    tl.store(codes_ptr + first + where, code.to(codes_ptr.dtype.element_ty), mask=mask)
    if KEEP:
        if part < 2:
            # q and k [2, rows, H D]: two tensors, one behind the other.
            kept = rectified_ptr + (part * rows + start).to(tl.int64) * (heads * D) + head * D
            tl.store(kept + r[:, None] * (heads * D) + d[None, :], y.to(rectified_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rectify_quantize_backward(
    grad_ptr,
    grad_q_ptr,
    grad_k_ptr,
    qkv_ptr,
    columns_ptr,
    grad_qkv_ptr,
    sums_ptr,
    rows,
    heads,
    eps,
    qn_q,
    qp_q,
    qn_k,
    qp_k,
    qn_v,
    qp_v,
    D: tl.constexpr,
    DP: tl.constexpr,
    R: tl.constexpr,
    TILES: tl.constexpr,
    RECTIFY: tl.constexpr,
    KEPT: tl.constexpr,
):
    part, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    width = 3 * heads * D
    d = tl.arange(0, DP)
    column = tl.program_id(1) * D + d
    r = tl.arange(0, R)
    where = r[:, None] * width + column[None, :]
    inverse_scale = 1.0 / tl.load(columns_ptr + column, mask=d < D, other=1.0)[None, :]
    offset = tl.load(columns_ptr + width + column, mask=d < D, other=0.0)[None, :]
    weight = tl.load(columns_ptr + 2 * width + column, mask=d < D, other=0.0)[None, :]
    bias = tl.load(columns_ptr + 3 * width + column, mask=d < D, other=0.0)[None, :]
    qn, qp = _bound(part, qn_q, qn_k, qn_v), _bound(part, qp_q, qp_k, qp_v)
    scale_sums = tl.zeros((R, DP), dtype=tl.float32)
    offset_sums = tl.zeros((R, DP), dtype=tl.float32)
    weight_sums = tl.zeros((R, DP), dtype=tl.float32)
    bias_sums = tl.zeros((R, DP), dtype=tl.float32)
    for tile in range(TILES):
        start = (tl.program_id(0) * TILES + tile) * R
        mask = (start + r < rows)[:, None] & (d < D)[None, :]
        first = start.to(tl.int64) * width
        x = tl.load(qkv_ptr + first + where, mask=mask, other=0.0).to(tl.float32)
        z, y = x, x
        inverse = tl.zeros((R,), dtype=tl.float32)
        if RECTIFY:
            if part < 2:
                z, inverse = _standardise(x, mask, eps, D)
                y = z * weight + bias
        grad = tl.load(grad_ptr + first + where, mask=mask, other=0.0).to(tl.float32)
        v, code, inside = quantize(y, inverse_scale, offset, qn, qp)
        passed = tl.where(inside, grad, 0.0)
        scale_sums += grad * tl.where(inside, code - v, code)
        offset_sums += grad - passed
        if KEPT:
            if part < 2:
                kept = tl.where(part == 0, grad_q_ptr, grad_k_ptr) + start.to(tl.int64) * (heads * D) + head * D
                passed += tl.load(kept + r[:, None] * (heads * D) + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if RECTIFY:
            if part < 2:
                weight_sums += passed * z
                bias_sums += passed
                slope = passed * weight
                along = tl.sum(slope * z, 1) / D
                passed = (slope - (tl.sum(slope, 1) / D)[:, None] - z * along[:, None]) * inverse[:, None]
        tl.store(grad_qkv_ptr + first + where, passed.to(grad_qkv_ptr.dtype.element_ty), mask=mask)
    sums = sums_ptr + tl.program_id(0) * 4 * width + column
    tl.store(sums, tl.sum(scale_sums, 0), mask=d < D)
    tl.store(sums + width, tl.sum(offset_sums, 0), mask=d < D)
    tl.store(sums + 2 * width, tl.sum(weight_sums, 0), mask=d < D)
    tl.store(sums + 3 * width, tl.sum(bias_sums, 0), mask=d < D)


class _RectifyQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, columns, heads, eps, ranges, keep):  # type: ignore[override]
        qkv = qkv.contiguous()
        width = qkv.shape[-1]
        rows, dim = qkv.numel() // width, width // (3 * heads)
        codes = torch.empty_like(qkv)
        rectified = torch.empty((2, rows, heads * dim) if keep else (2, 1), dtype=qkv.dtype, device=qkv.device)
        side = triton.next_power_of_2(dim)
        shape = {"D": dim, "DP": side, "R": max(_NUMBERS // side, 1), "RECTIFY": eps is not None}
        grid = (triton.cdiv(rows, shape["R"]), 3 * heads)
        _rectify_quantize[grid](qkv, columns, codes, rectified, rows, heads, eps or 0.0, *ranges, KEEP=keep, **shape)
        ctx.save_for_backward(qkv, columns)
        ctx.arguments = (rows, heads, eps or 0.0, *ranges)
        ctx.shape, ctx.keep = shape, keep
        ctx.set_materialize_grads(False)
        q, k = rectified
        return codes, q, k

    @staticmethod
    def backward(ctx, grad, grad_q, grad_k):  # type: ignore[override]
        qkv, columns = ctx.saved_tensors
        rows, heads = ctx.arguments[:2]
        grad = torch.zeros_like(qkv) if grad is None else grad.contiguous()
        kept = ctx.keep and (grad_q is not None or grad_k is not None)
        if kept:
            like = next(g for g in (grad_q, grad_k) if g is not None)
            grad_q, grad_k = (torch.zeros_like(like) if g is None else g.contiguous() for g in (grad_q, grad_k))
        programs = triton.cdiv(rows, ctx.shape["R"] * _TILES_A_PROGRAM)
        grad_qkv = torch.empty_like(qkv)
        sums = torch.empty((programs, *columns.shape), dtype=torch.float32, device=qkv.device)
        _rectify_quantize_backward[(programs, 3 * heads)](
            grad,
            grad_q if kept else grad,
            grad_k if kept else grad,
            qkv,
            columns,
            grad_qkv,
            sums,
            *ctx.arguments,
            TILES=_TILES_A_PROGRAM,
            KEPT=kept,
            **ctx.shape,
        )
        return grad_qkv, sums.sum(0), None, None, None, None


def rectify_quantize(
    qkv: torch.Tensor, columns: torch.Tensor, heads: int, eps: float | None, ranges: Ranges, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """IRM and quantization of q, k and v.

    Args:
        qkv: [.., 3 H D]: q of all heads, then k, then v.
        columns: float32 [4, 3 H D]: scale, offset, IRM's weight and IRM's bias of every channel. Those of v do not matter,
            nor do the last two without IRM.
        heads: H.
        eps: of IRM; ``None`` without IRM.
        ranges: of the codes.
        keep: also return q and k as they enter their quantizers.

    Returns:
        codes [.., 3 H D], q~ and k~ [rows, H D] (without meaning where they are not kept), all in the type of qkv.
        Gradients reach qkv and columns, from all three.
    """
    return _RectifyQuantize.apply(qkv, columns, heads, eps, ranges, keep)
