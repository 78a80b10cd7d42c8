"""Quantized attention within windows, with a bias and a mask added to the scores: a window's whole map lies in registers.

A window of Swin has 49 tokens, so one program holds the map of a window and head at once. Forward reads q, k and v, backward
those and the output's gradient, once each; nothing is kept between the two but the codes. A program goes through several
windows of one head, and what is summed over windows (the gradients of bias and map scale) stays in its registers meanwhile.

The formulas are those of `qvit.kernels.attention`; the gradient of the bias is that of the scores, summed over windows.

Plain counterpart: `qvit.layers.code_matmul.code_scores` and ``code_values`` around bias, mask, softmax and the map's quantizer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qvit.kernels.arithmetic import round_half_even
from qvit.kernels.attention_operands import load_codes, load_grad, load_queries, load_values, score_scale

MOST_TOKENS = 64  # of a window whose map fits the registers
_PROGRAMS = 1024  # to be had for a whole GPU, before a program gets more than one window
_MOST_WINDOWS = 32  # a program
_STAGES = 2  # one copy of each operand in shared memory, so that several programs share a multiprocessor


@triton.jit
def _scores_bias(bias_ptr, head, N: tl.constexpr, P: tl.constexpr):
    """The bias [P, P] of a head to the base 2; next to minus infinity for keys beyond the last token."""
    n = tl.arange(0, P)
    known = (n < N)[:, None] & (n < N)[None, :]
    where = bias_ptr + head * N * N + n[:, None] * N + n[None, :]
    bias = tl.load(where, mask=known, other=0.0).to(tl.float32) * 1.4426950408889634
    return tl.where((n < N)[None, :], bias, -1e30)


@triton.jit
def _map(q, k, bias, mask_ptr, window, scale, N: tl.constexpr, P: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """The softmax map [P, P] of a window; a row beyond the last token has no meaning."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale + bias
    if MASKED:
        n = tl.arange(0, P)
        known = (n < N)[:, None] & (n < N)[None, :]
        where = mask_ptr + window * N * N + n[:, None] * N + n[None, :]
        scores += tl.load(where, mask=known, other=0.0).to(tl.float32) * 1.4426950408889634
    powers = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return powers * (1.0 / tl.sum(powers, 1))[:, None]


@triton.jit
def _window_attention(
    codes_ptr,
    columns_ptr,
    map_scale_ptr,
    bias_ptr,
    mask_ptr,
    out_ptr,
    sequences,
    windows,
    heads,
    a_program,
    factor,
    qp,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    P: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, first = tl.program_id(0) % heads, (tl.program_id(0) // heads) * a_program
    n, d = tl.arange(0, P), tl.arange(0, DP)
    scale = score_scale(columns_ptr, heads, head, factor, D)
    bias = _scores_bias(bias_ptr, head, N, P)
    map_scale = tl.load(map_scale_ptr + head)
    inverse_map_scale = 1.0 / map_scale
    column = (2 * heads + head) * D + d
    v_scale = tl.load(columns_ptr + column, mask=d < D, other=0.0)
    v_offset = tl.load(columns_ptr + 3 * heads * D + column, mask=d < D, other=0.0)
    for step in range(tl.minimum(a_program, sequences - first)):
        sequence = first + step
        q = load_queries(codes_ptr, columns_ptr, sequence, N, heads, head, n, D, DP)
        k = load_codes(codes_ptr, sequence, N, heads, head, 1, n, D, DP)
        v = load_codes(codes_ptr, sequence, N, heads, head, 2, n, D, DP)
        p = _map(q, k, bias, mask_ptr, sequence % windows, scale, N, P, MASKED, PRECISION)
        code = round_half_even(tl.minimum(p * inverse_map_scale, qp))
        sums = tl.dot(code.to(v.dtype), v, input_precision=PRECISION)
        out = map_scale * (sums * v_scale[None, :] + tl.sum(code, 1)[:, None] * v_offset[None, :])
        start = out_ptr + sequence.to(tl.int64) * N * (heads * D) + head * D
        where = n[:, None] * (heads * D) + d[None, :]
        tl.store(start + where, out.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (d < D)[None, :])


@triton.jit
def _window_attention_backward(
    codes_ptr,
    columns_ptr,
    map_scale_ptr,
    bias_ptr,
    mask_ptr,
    grad_ptr,
    grad_codes_ptr,
    bias_sums_ptr,
    map_sums_ptr,
    sequences,
    windows,
    heads,
    a_program,
    factor,
    qp,
    N: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    P: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    head, first = tl.program_id(0) % heads, (tl.program_id(0) // heads) * a_program
    n, d = tl.arange(0, P), tl.arange(0, DP)
    known = (n < N)[:, None] & (d < D)[None, :]
    scale = score_scale(columns_ptr, heads, head, factor, D)
    q_factor = tl.load(columns_ptr + (heads + head) * D) * factor
    k_factor = tl.load(columns_ptr + head * D) * factor
    bias = _scores_bias(bias_ptr, head, N, P)
    map_scale = tl.load(map_scale_ptr + head)
    inverse_map_scale = 1.0 / map_scale
    bias_sums = tl.zeros((P, P), tl.float32)
    map_sums = tl.zeros((P,), tl.float32)
    for step in range(tl.minimum(a_program, sequences - first)):
        sequence = first + step
        q = load_queries(codes_ptr, columns_ptr, sequence, N, heads, head, n, D, DP)
        k = load_codes(codes_ptr, sequence, N, heads, head, 1, n, D, DP)
        v = load_values(codes_ptr, columns_ptr, sequence, N, heads, head, n, D, DP)
        # Zero beyond the last token, so that rows of the map without meaning add nothing anywhere.
        grad = load_grad(grad_ptr, sequence, N, heads, head, n, D, DP)
        p = _map(q, k, bias, mask_ptr, sequence % windows, scale, N, P, MASKED, PRECISION)
        position = p * inverse_map_scale
        inside = position <= qp
        code = round_half_even(tl.minimum(position, qp))
        value_grad = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        map_sums += tl.sum(value_grad * tl.where(inside, code - position, code), 1)
        along = p * tl.where(inside, value_grad, 0.0)
        score_grad = along - p * tl.sum(along, 1)[:, None]
        bias_sums += score_grad
        rounded = score_grad.to(k.dtype)
        # A constant that is added to all of k, such as its offset, changes nothing here: every row sums to zero.
        grad_q = tl.dot(rounded, k, input_precision=PRECISION) * q_factor
        grad_k = tl.dot(tl.trans(rounded), q, input_precision=PRECISION) * k_factor
        grad_v = tl.dot(tl.trans(code.to(grad.dtype)), grad, input_precision=PRECISION) * map_scale
        start = grad_codes_ptr + sequence.to(tl.int64) * N * (3 * heads * D) + head * D
        where = start + n[:, None] * (3 * heads * D) + d[None, :]
        tl.store(where, grad_q.to(grad_codes_ptr.dtype.element_ty), mask=known)
        tl.store(where + heads * D, grad_k.to(grad_codes_ptr.dtype.element_ty), mask=known)
        tl.store(where + 2 * heads * D, grad_v.to(grad_codes_ptr.dtype.element_ty), mask=known)
    square = (n < N)[:, None] & (n < N)[None, :]
    start = bias_sums_ptr + tl.program_id(0).to(tl.int64) * N * N
    tl.store(start + n[:, None] * N + n[None, :], bias_sums, mask=square)
    tl.store(map_sums_ptr + tl.program_id(0), tl.sum(map_sums, 0))


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, codes, columns, map_scale, bias, mask, qp):  # type: ignore[override]
        b, n, width = codes.shape
        heads = len(bias)
        dim = width // (3 * heads)
        a_program = min(max(b * heads // _PROGRAMS, 1), _MOST_WINDOWS)
        options = {
            "N": n,  # addresses within a map are then constants, which need no registers
            "D": dim,
            "DP": max(triton.next_power_of_2(dim), 16),
            "P": max(triton.next_power_of_2(n), 16),
            "MASKED": mask is not None,
            "PRECISION": "ieee" if codes.dtype == torch.float32 else "tf32",
            "num_stages": _STAGES,  # with four warps a map takes 32 registers a thread
        }
        out = torch.empty((b, n, heads * dim), dtype=codes.dtype, device=codes.device)
        given = (codes, columns, map_scale, bias, bias if mask is None else mask)
        ctx.arguments = (b, 1 if mask is None else len(mask), heads, a_program, dim**-0.5, float(qp))
        ctx.groups, ctx.options = triton.cdiv(b, a_program), options
        _window_attention[(ctx.groups * heads,)](*given, out, *ctx.arguments, **options)
        ctx.save_for_backward(*given)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        codes, _, _, bias, _ = given = ctx.saved_tensors
        grad = grad.to(codes.dtype).contiguous()
        grad_codes = torch.empty_like(codes)
        bias_sums = torch.empty((ctx.groups, *bias.shape), dtype=torch.float32, device=codes.device)
        map_sums = torch.empty((ctx.groups, len(bias)), dtype=torch.float32, device=codes.device)
        _window_attention_backward[(map_sums.numel(),)](
            *given, grad, grad_codes, bias_sums, map_sums, *ctx.arguments, **ctx.options
        )
        return grad_codes, None, map_sums.sum(0), bias_sums.sum(0), None, None


def quantized_window_attention(
    codes: torch.Tensor,
    columns: torch.Tensor,
    map_scale: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    qp: int,
) -> torch.Tensor:
    """``quantize(softmax(q k^T / sqrt(D) + bias + mask)) v`` of all heads of windows.

    Args:
        codes, columns, map_scale, qp: as in `qvit.kernels.attention.quantized_attention`; B counts windows, those of an image
            one behind the other, and N is at most `MOST_TOKENS`.
        bias: float32 [H, N, N], queries by keys.
        mask: float32 [W, N, N], of the W windows of an image; ``None`` for no mask.

    Returns:
        [B, N, H D], in the type of the codes. Gradients reach codes, map_scale and bias.
    """
    mask = None if mask is None else mask.contiguous()
    return _WindowAttention.apply(codes.contiguous(), columns.detach(), map_scale, bias.contiguous(), mask, qp)
