"""DGD's distance of two token similarities in one kernel a direction: the D x D products live and die in registers.

The N x N similarity matrices are never formed, nor are the D x D products that stand for them written to memory.
Plain counterpart, with the derivation: `qvit.distill.similarity.similarity_distance`. With S = student, T = teacher [N, D],
A = S^T S, X = T^T S, a, t, x the squared norms of A, T^T T, X:

    d2 = 2 - 2 x / sqrt(a t)          gradient of d2 in S = -4 (T X - (x / a) S A) / sqrt(a t)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_TOKENS = 64  # a tile
# With four warps, three products of 64 x 64 leave no registers. Of 32 x 32, a thread needs as many registers with eight warps
# as with four, with which a multiprocessor of Hopper holds three programs instead of one.
_WARPS, _NARROW_WARPS, _NARROW = 8, 4, 32


@triton.jit
def _tile(x_ptr, batch, token, channel, image, head, part_of_head, n, tokens, D: tl.constexpr, DP: tl.constexpr):
    d = tl.arange(0, DP)
    where = image.to(tl.int64) * batch + head * part_of_head + n[:, None].to(tl.int64) * token + d[None, :] * channel
    return tl.load(x_ptr + where, mask=(n < tokens)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _similarity(
    s_ptr,
    t_ptr,
    norms_ptr,
    tokens,
    heads,
    s_batch,
    s_head,
    s_token,
    s_channel,
    t_batch,
    t_head,
    t_token,
    t_channel,
    DS: tl.constexpr,
    DT: tl.constexpr,
    DSP: tl.constexpr,
    DTP: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    own = tl.zeros((DSP, DSP), tl.float32)
    cross = tl.zeros((DTP, DSP), tl.float32)
    other = tl.zeros((DTP, DTP), tl.float32)
    for start in range(0, tokens, T):
        n = start + tl.arange(0, T)
        s = _tile(s_ptr, s_batch, s_token, s_channel, image, head, s_head, n, tokens, DS, DSP)
        t = _tile(t_ptr, t_batch, t_token, t_channel, image, head, t_head, n, tokens, DT, DTP).to(s.dtype)
        own += tl.dot(tl.trans(s), s, input_precision=PRECISION)
        cross += tl.dot(tl.trans(t), s, input_precision=PRECISION)
        other += tl.dot(tl.trans(t), t, input_precision=PRECISION)
    where = norms_ptr + tl.program_id(0) * 3
    tl.store(where, tl.sum(tl.sum(own * own, 1), 0))
    tl.store(where + 1, tl.sum(tl.sum(other * other, 1), 0))
    tl.store(where + 2, tl.sum(tl.sum(cross * cross, 1), 0))


@triton.jit
def _similarity_backward(
    s_ptr,
    t_ptr,
    factors_ptr,
    grad_ptr,
    tokens,
    heads,
    s_batch,
    s_head,
    s_token,
    s_channel,
    t_batch,
    t_head,
    t_token,
    t_channel,
    DS: tl.constexpr,
    DT: tl.constexpr,
    DSP: tl.constexpr,
    DTP: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    own = tl.zeros((DSP, DSP), tl.float32)
    cross = tl.zeros((DTP, DSP), tl.float32)
    for start in range(0, tokens, T):
        n = start + tl.arange(0, T)
        s = _tile(s_ptr, s_batch, s_token, s_channel, image, head, s_head, n, tokens, DS, DSP)
        t = _tile(t_ptr, t_batch, t_token, t_channel, image, head, t_head, n, tokens, DT, DTP).to(s.dtype)
        own += tl.dot(tl.trans(s), s, input_precision=PRECISION)
        cross += tl.dot(tl.trans(t), s, input_precision=PRECISION)
    # The two terms nearly cancel where student and teacher are close, so they are not rounded to bfloat16.
    cross *= tl.load(factors_ptr + tl.program_id(0) * 2)
    own *= tl.load(factors_ptr + tl.program_id(0) * 2 + 1)
    d = tl.arange(0, DSP)
    for start in range(0, tokens, T):
        n = start + tl.arange(0, T)
        s = _tile(s_ptr, s_batch, s_token, s_channel, image, head, s_head, n, tokens, DS, DSP).to(tl.float32)
        t = _tile(t_ptr, t_batch, t_token, t_channel, image, head, t_head, n, tokens, DT, DTP).to(tl.float32)
        grad = tl.dot(t, cross, input_precision=PRECISION) - tl.dot(s, own, input_precision=PRECISION)
        where = image.to(tl.int64) * s_batch + head * s_head + n[:, None].to(tl.int64) * s_token + d[None, :] * s_channel
        tl.store(grad_ptr + where, grad.to(grad_ptr.dtype.element_ty), mask=(n < tokens)[:, None] & (d < DS)[None, :])


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, close, tiny):  # type: ignore[override]
        b, h, n, dim = student.shape
        norms = torch.empty((b, h, 3), dtype=torch.float32, device=student.device)
        strides = (*student.stride(), *teacher.stride())
        shape = {
            "DS": dim,
            "DT": teacher.shape[-1],
            "DSP": max(triton.next_power_of_2(dim), 16),
            "DTP": max(triton.next_power_of_2(teacher.shape[-1]), 16),
            "T": _TOKENS,
            "PRECISION": "ieee" if student.dtype == torch.float32 else "tf32",
        }
        shape["num_warps"] = _NARROW_WARPS if max(shape["DSP"], shape["DTP"]) <= _NARROW else _WARPS
        _similarity[(b * h,)](student, teacher, norms, n, h, *strides, **shape)
        own, other, cross = norms.unbind(-1)
        inverse = (own.sqrt() * other.sqrt()).clamp_min(tiny).reciprocal()
        squared = (2 - 2 * cross * inverse).clamp_min(0)
        distance = squared * squared.clamp_min(close).rsqrt()
        slope = torch.where(squared > close, 0.5 * squared.clamp_min(close).rsqrt(), close**-0.5).where(squared > 0, 0)
        outer = -4 * inverse * slope
        factors = torch.stack([outer, outer * cross / own.clamp_min(tiny)], -1)
        ctx.save_for_backward(student, teacher, factors)
        ctx.arguments = (n, h, *strides)
        ctx.shape = shape
        return distance

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        student, teacher, factors = ctx.saved_tensors
        factors = (factors * grad[..., None]).contiguous()
        # preserve_format: dense and in the order of the student's strides, which the kernel is given.
        grad_student = torch.empty_like(student)
        assert grad_student.stride() == student.stride()
        _similarity_backward[(student.shape[0] * student.shape[1],)](
            student, teacher, factors, grad_student, *ctx.arguments, **ctx.shape
        )
        return grad_student, None, None, None


def fused_similarity_distance(student: torch.Tensor, teacher: torch.Tensor, close: float, tiny: float) -> torch.Tensor:
    """`qvit.distill.similarity.similarity_distance`.

    Args:
        student: [B, H, N, D_s], a permuted dense tensor (no gaps between its elements).
        teacher: [B, H, N, D_t], of any strides.
        close: squared distance below which the distance is replaced by its chord.
        tiny: least divisor.

    Returns:
        [B, H], float32. Gradients reach the student.
    """
    with torch.autocast(student.device.type, enabled=False):
        return _Distance.apply(student, teacher, close, tiny)
