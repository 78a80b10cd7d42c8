"""Quantized attention that keeps no N x N map: scores, softmax, codes of the map and values, tile by tile.

The map is quantized after softmax has been normalised, so a row needs its maximum and sum before its first code: forward goes
over the keys twice. Backward recomputes scores and map from the codes of q and k and one number a row, in two kernels: one
program a tile of queries (their gradient, what softmax's backward sums over a row, and the gradient of the map's scale), then
one a tile of keys (gradients of k and v). With p the map, c its codes, s its scale, dc = dO v^T the gradient of its values:

    dp = dc where p / s lies in the range, else 0        ds = sum dc (c - p / s) inside, sum dc c outside
    dS = p (dp - sum_keys p dp)                          (softmax)

Plain counterpart: `qvit.layers.code_matmul.code_scores` and ``code_values`` around softmax and the map's `LSQQuantizer`.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from qvit.kernels.arithmetic import round_half_even
from qvit.kernels.attention_operands import load_codes, load_grad, load_queries, load_values, score_scale

_QUERIES, _KEYS = 64, 32  # a tile; the fastest of eleven on an H100 at 257 tokens and D = 64 (docs/decisions.md)


@triton.jit
def _attention(
    codes_ptr,
    columns_ptr,
    map_scale_ptr,
    out_ptr,
    row_ptr,
    tokens,
    heads,
    factor,
    qp,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    m = tl.program_id(0) * M + tl.arange(0, M)
    q = load_queries(codes_ptr, columns_ptr, image, tokens, heads, head, m, D, DP)
    scale = score_scale(columns_ptr, heads, head, factor, D)
    largest = tl.full((M,), -1e30, tl.float32)
    total = tl.zeros((M,), tl.float32)
    for start in range(0, tokens, T):
        n = start + tl.arange(0, T)
        k = load_codes(codes_ptr, image, tokens, heads, head, 1, n, D, DP)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = tl.where((n < tokens)[None, :], scores, -1e30)
        higher = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp2(largest - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        largest = higher
    row = largest + tl.log2(total)  # 2^(score - row) is the map
    map_scale = tl.load(map_scale_ptr + head)
    inverse_map_scale = 1.0 / map_scale
    sums = tl.zeros((M, DP), tl.float32)
    code_sums = tl.zeros((M,), tl.float32)
    for start in range(0, tokens, T):
        n = start + tl.arange(0, T)
        k = load_codes(codes_ptr, image, tokens, heads, head, 1, n, D, DP)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.where((n < tokens)[None, :], tl.exp2(scores - row[:, None]), 0.0)
        code = round_half_even(tl.minimum(p * inverse_map_scale, qp))
        v = load_codes(codes_ptr, image, tokens, heads, head, 2, n, D, DP)
        sums += tl.dot(code.to(v.dtype), v, input_precision=PRECISION)
        code_sums += tl.sum(code, 1)
    d = tl.arange(0, DP)
    column = (2 * heads + head) * D + d
    v_scale = tl.load(columns_ptr + column, mask=d < D, other=0.0)
    v_offset = tl.load(columns_ptr + 3 * heads * D + column, mask=d < D, other=0.0)
    out = map_scale * (sums * v_scale[None, :] + code_sums[:, None] * v_offset[None, :])
    first = out_ptr + image.to(tl.int64) * tokens * (heads * D) + head * D
    where = m[:, None] * (heads * D) + d[None, :]
    tl.store(first + where, out.to(out_ptr.dtype.element_ty), mask=(m < tokens)[:, None] & (d < D)[None, :])
    tl.store(row_ptr + tl.program_id(1) * tokens + m, row, mask=m < tokens)


@triton.jit
def _map_tile(q, k, v, grad, row, n, tokens, scale, inverse_map_scale, qp, PRECISION: tl.constexpr):
    """(p, its codes, dp, the map scale's gradient) [M, T] of a tile, from codes and the gradient of the output."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    p = tl.where((n < tokens)[None, :], tl.exp2(scores - row[:, None]), 0.0)
    position = p * inverse_map_scale
    inside = position <= qp
    code = round_half_even(tl.minimum(position, qp))
    value_grad = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    return p, code, tl.where(inside, value_grad, 0.0), value_grad * tl.where(inside, code - position, code)


@triton.jit
def _attention_backward_queries(
    codes_ptr,
    columns_ptr,
    map_scale_ptr,
    grad_ptr,
    row_ptr,
    along_ptr,
    grad_codes_ptr,
    map_sums_ptr,
    tokens,
    heads,
    factor,
    qp,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    m = tl.program_id(0) * M + tl.arange(0, M)
    d = tl.arange(0, DP)
    q = load_queries(codes_ptr, columns_ptr, image, tokens, heads, head, m, D, DP)
    grad = load_grad(grad_ptr, image, tokens, heads, head, m, D, DP)
    # Beyond the last token the map is 2^-inf = 0.
    row = tl.load(row_ptr + tl.program_id(1) * tokens + m, mask=m < tokens, other=float("inf"))
    scale = score_scale(columns_ptr, heads, head, factor, D)
    inverse_map_scale = 1.0 / tl.load(map_scale_ptr + head)
    along = tl.zeros((M,), tl.float32)
    map_sums = tl.zeros((M,), tl.float32)
    for start in range(0, tokens, T):
        n = start + tl.arange(0, T)
        k = load_codes(codes_ptr, image, tokens, heads, head, 1, n, D, DP)
        v = load_values(codes_ptr, columns_ptr, image, tokens, heads, head, n, D, DP)
        p, _, dp, ds = _map_tile(q, k, v, grad, row, n, tokens, scale, inverse_map_scale, qp, PRECISION)
        along += tl.sum(p * dp, 1)
        map_sums += tl.sum(ds, 1)
    sums = tl.zeros((M, DP), tl.float32)
    for start in range(0, tokens, T):
        n = start + tl.arange(0, T)
        k = load_codes(codes_ptr, image, tokens, heads, head, 1, n, D, DP)
        v = load_values(codes_ptr, columns_ptr, image, tokens, heads, head, n, D, DP)
        p, _, dp, _ = _map_tile(q, k, v, grad, row, n, tokens, scale, inverse_map_scale, qp, PRECISION)
        # A constant that is added to all of k, such as its offset, changes nothing here: every row of dS sums to zero.
        sums += tl.dot((p * (dp - along[:, None])).to(k.dtype), k, input_precision=PRECISION)
    grad_q = sums * (tl.load(columns_ptr + (heads + head) * D) * factor)
    first = grad_codes_ptr + image.to(tl.int64) * tokens * (3 * heads * D) + head * D
    where = m[:, None] * (3 * heads * D) + d[None, :]
    tl.store(first + where, grad_q.to(grad_codes_ptr.dtype.element_ty), mask=(m < tokens)[:, None] & (d < D)[None, :])
    tl.store(along_ptr + tl.program_id(1) * tokens + m, along, mask=m < tokens)
    tl.store(map_sums_ptr + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(map_sums, 0))


@triton.jit
def _attention_backward_keys(
    codes_ptr,
    columns_ptr,
    map_scale_ptr,
    grad_ptr,
    row_ptr,
    along_ptr,
    grad_codes_ptr,
    tokens,
    heads,
    factor,
    qp,
    D: tl.constexpr,
    DP: tl.constexpr,
    M: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    n = tl.program_id(0) * T + tl.arange(0, T)
    d = tl.arange(0, DP)
    k = load_codes(codes_ptr, image, tokens, heads, head, 1, n, D, DP)
    v = load_values(codes_ptr, columns_ptr, image, tokens, heads, head, n, D, DP)
    scale = score_scale(columns_ptr, heads, head, factor, D)
    map_scale = tl.load(map_scale_ptr + head)
    inverse_map_scale = 1.0 / map_scale
    sums_k = tl.zeros((T, DP), tl.float32)
    sums_v = tl.zeros((T, DP), tl.float32)
    for start in range(0, tokens, M):
        m = start + tl.arange(0, M)
        q = load_queries(codes_ptr, columns_ptr, image, tokens, heads, head, m, D, DP)
        grad = load_grad(grad_ptr, image, tokens, heads, head, m, D, DP)
        row = tl.load(row_ptr + tl.program_id(1) * tokens + m, mask=m < tokens, other=float("inf"))
        along = tl.load(along_ptr + tl.program_id(1) * tokens + m, mask=m < tokens, other=0.0)
        p, code, dp, _ = _map_tile(q, k, v, grad, row, n, tokens, scale, inverse_map_scale, qp, PRECISION)
        sums_k += tl.dot(tl.trans((p * (dp - along[:, None])).to(q.dtype)), q, input_precision=PRECISION)
        sums_v += tl.dot(tl.trans(code.to(grad.dtype)), grad, input_precision=PRECISION)
    mask = (n < tokens)[:, None] & (d < D)[None, :]
    first = grad_codes_ptr + image.to(tl.int64) * tokens * (3 * heads * D) + (heads + head) * D
    where = n[:, None] * (3 * heads * D) + d[None, :]
    grad_k = sums_k * (tl.load(columns_ptr + head * D) * factor)
    tl.store(first + where, grad_k.to(grad_codes_ptr.dtype.element_ty), mask=mask)
    tl.store(first + where + heads * D, (sums_v * map_scale).to(grad_codes_ptr.dtype.element_ty), mask=mask)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, codes, columns, map_scale, heads, qp):  # type: ignore[override]
        b, n, width = codes.shape
        dim = width // (3 * heads)
        out = torch.empty((b, n, heads * dim), dtype=codes.dtype, device=codes.device)
        row = torch.empty((b * heads, n), dtype=torch.float32, device=codes.device)
        shape = {
            "D": dim,
            "DP": max(triton.next_power_of_2(dim), 16),
            "M": _QUERIES,
            "T": _KEYS,
            "PRECISION": "ieee" if codes.dtype == torch.float32 else "tf32",
        }
        factor = dim**-0.5
        _attention[(triton.cdiv(n, _QUERIES), b * heads)](
            codes, columns, map_scale, out, row, n, heads, factor, float(qp), **shape
        )
        ctx.save_for_backward(codes, columns, map_scale, row)
        ctx.arguments = (n, heads, factor, float(qp))
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        codes, columns, map_scale, row = ctx.saved_tensors
        n, heads = ctx.arguments[:2]
        rows = len(row)
        grad = grad.to(codes.dtype).contiguous()
        grad_codes = torch.empty_like(codes)
        along = torch.empty_like(row)
        tiles = math.ceil(n / _QUERIES)
        map_sums = torch.empty((rows, tiles), dtype=torch.float32, device=codes.device)
        given = (codes, columns, map_scale, grad, row, along, grad_codes)
        _attention_backward_queries[(tiles, rows)](*given, map_sums, *ctx.arguments, **ctx.shape)
        _attention_backward_keys[(triton.cdiv(n, _KEYS), rows)](*given, *ctx.arguments, **ctx.shape)
        return grad_codes, None, map_sums.view(-1, heads, tiles).sum((0, 2)), None, None


def quantized_attention(
    codes: torch.Tensor, columns: torch.Tensor, map_scale: torch.Tensor, heads: int, qp: int
) -> torch.Tensor:
    """``quantize(softmax(q k^T / sqrt(D))) v`` of all heads.

    Args:
        codes: [B, N, 3 H D] of q, k and v (`qvit.kernels.rectify_quantize`); their gradient is that of the values.
        columns: float32 [4, 3 H D], whose first two rows are scale and offset of every channel. q and k have one scale a head.
            k's offset is not read: softmax cancels what it adds.
        map_scale: float32 [H], of the map's codes 0 to ``qp``.
        heads: H.

    Returns:
        [B, N, H D], in the type of the codes. Gradients reach codes and map_scale; those of ``columns`` flow through codes.
    """
    return _Attention.apply(codes.contiguous(), columns.detach(), map_scale, heads, qp)
