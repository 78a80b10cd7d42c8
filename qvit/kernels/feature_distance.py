"""The distance of features in one pass over student and teacher forward, and one backward.

Plain counterpart: `qvit.distill.features.feature_distance`. With rows r of batch and tokens and channels c,

    distance = mean over c of  sum_r (s - t)^2 / (R variance_c)          gradient in s = 2 (s - t) / (R C variance_c)

Each program takes a stack of rows of some channels: their mean and their squared deviations from it, of the teacher, and the
squared differences. One more program puts the stacks together: ``sum M2 + n (mean - all's mean)^2``, so that no large mean
cancels a small variance.

Source of the sums: Chan et al., "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS, _COLUMNS = 8, 128  # a tile
_TILES_A_PROGRAM = 32  # one below the other, so that sums over rows stay in registers
_FINISHING = 8192  # numbers at once in the last program


@triton.jit
def _addresses(r, tokens, batch_stride, token_stride, c):
    image, token = r // tokens, r % tokens
    return image.to(tl.int64)[:, None] * batch_stride + token[:, None] * token_stride + c[None, :]


@triton.jit
def _feature_sums(
    s_ptr,
    t_ptr,
    sums_ptr,
    rows,
    columns,
    tokens,
    s_batch,
    s_token,
    t_batch,
    t_token,
    R: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
):
    c = tl.program_id(1) * C + tl.arange(0, C)
    first = tl.program_id(0) * TILES * R
    known = c < columns
    # A value of the stack's own channel: what is summed is then of the size of its deviations.
    near = (first // tokens).to(tl.int64) * t_batch + (first % tokens) * t_token
    shift = tl.load(t_ptr + near + c, mask=known, other=0.0).to(tl.float32)[None, :]
    deviations = tl.zeros((R, C), tl.float32)
    squares = tl.zeros((R, C), tl.float32)
    differences = tl.zeros((R, C), tl.float32)
    for tile in range(TILES):
        r = first + tile * R + tl.arange(0, R)
        mask = (r < rows)[:, None] & known[None, :]
        s = tl.load(s_ptr + _addresses(r, tokens, s_batch, s_token, c), mask=mask, other=0.0).to(tl.float32)
        t = tl.load(t_ptr + _addresses(r, tokens, t_batch, t_token, c), mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, t - shift, 0.0)
        deviations += d
        squares += d * d
        differences += (s - t) * (s - t)
    count = tl.minimum(rows - first, TILES * R)
    total = tl.sum(deviations, 0)[None, :]
    where = sums_ptr + tl.program_id(0) * 3 * columns + c[None, :]
    tl.store(where, shift + total / count, mask=known[None, :])
    tl.store(where + columns, tl.sum(squares, 0)[None, :] - total * total / count, mask=known[None, :])
    tl.store(where + 2 * columns, tl.sum(differences, 0)[None, :], mask=known[None, :])


@triton.jit
def _feature_finish(
    sums_ptr,
    weight_ptr,
    distance_ptr,
    programs,
    rows,
    columns,
    rows_a_program,
    least,
    tiny,
    P: tl.constexpr,
    C: tl.constexpr,
):
    c = tl.arange(0, C)
    known = c < columns
    total = tl.zeros((P, C), tl.float32)
    for start in range(0, programs, P):
        p = start + tl.arange(0, P)
        mask = (p < programs)[:, None] & known[None, :]
        count = tl.minimum(rows - p * rows_a_program, rows_a_program).to(tl.float32)[:, None]
        mean = tl.load(sums_ptr + p[:, None] * 3 * columns + c[None, :], mask=mask, other=0.0)
        total += tl.where(mask, mean * count, 0.0)
    center = (tl.sum(total, 0) / rows)[None, :]
    spread = tl.zeros((P, C), tl.float32)
    differences = tl.zeros((P, C), tl.float32)
    for start in range(0, programs, P):
        p = start + tl.arange(0, P)
        mask = (p < programs)[:, None] & known[None, :]
        count = tl.minimum(rows - p * rows_a_program, rows_a_program).to(tl.float32)[:, None]
        where = sums_ptr + p[:, None] * 3 * columns + c[None, :]
        off = tl.load(where, mask=mask, other=0.0) - center
        squares = tl.load(where + columns, mask=mask, other=0.0)
        spread += tl.where(mask, squares + count * off * off, 0.0)
        differences += tl.load(where + 2 * columns, mask=mask, other=0.0)
    variance = tl.maximum(tl.sum(spread, 0), 0.0) / rows
    floor = least * tl.sum(tl.where(known, variance, 0.0), 0) / columns
    variance = tl.maximum(tl.maximum(variance, floor), tiny)
    weight = 1.0 / (variance * rows) / columns
    tl.store(weight_ptr + c, weight, mask=known)
    tl.store(distance_ptr, tl.sum(tl.where(known, tl.sum(differences, 0) * weight, 0.0), 0))


@triton.jit
def _feature_backward(
    s_ptr,
    t_ptr,
    weight_ptr,
    upstream_ptr,
    grad_ptr,
    rows,
    columns,
    tokens,
    s_batch,
    s_token,
    t_batch,
    t_token,
    R: tl.constexpr,
    C: tl.constexpr,
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * C + tl.arange(0, C)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    weight = 2.0 * tl.load(upstream_ptr) * tl.load(weight_ptr + c, mask=c < columns, other=0.0)[None, :]
    s = tl.load(s_ptr + _addresses(r, tokens, s_batch, s_token, c), mask=mask, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + _addresses(r, tokens, t_batch, t_token, c), mask=mask, other=0.0).to(tl.float32)
    where = r.to(tl.int64)[:, None] * columns + c[None, :]
    tl.store(grad_ptr + where, ((s - t) * weight).to(grad_ptr.dtype.element_ty), mask=mask)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, least, tiny):  # type: ignore[override]
        student, teacher = (x if x.stride(-1) == 1 else x.contiguous() for x in (student, teacher))
        batch, tokens, columns = student.shape
        rows = batch * tokens
        programs = triton.cdiv(rows, _ROWS * _TILES_A_PROGRAM)
        tiles = triton.cdiv(columns, _COLUMNS)
        places = (rows, columns, tokens, *student.stride()[:2], *teacher.stride()[:2])
        sums = torch.empty((programs, 3, columns), dtype=torch.float32, device=student.device)
        weight = torch.empty(columns, dtype=torch.float32, device=student.device)
        distance = torch.empty((), dtype=torch.float32, device=student.device)
        shape = {"R": _ROWS, "C": _COLUMNS}
        _feature_sums[(programs, tiles)](student, teacher, sums, *places, **shape, TILES=_TILES_A_PROGRAM)
        wide = triton.next_power_of_2(columns)
        _feature_finish[(1,)](
            sums,
            weight,
            distance,
            programs,
            rows,
            columns,
            _ROWS * _TILES_A_PROGRAM,
            least,
            tiny,
            P=max(_FINISHING // wide, 1),
            C=wide,
            num_warps=8,
        )
        ctx.save_for_backward(student, teacher, weight)
        ctx.places, ctx.grid, ctx.tile = places, (triton.cdiv(rows, _ROWS), tiles), shape
        return distance

    @staticmethod
    def backward(ctx, upstream):  # type: ignore[override]
        student, teacher, weight = ctx.saved_tensors
        grad = torch.empty(student.shape, dtype=student.dtype, device=student.device)
        _feature_backward[ctx.grid](student, teacher, weight, upstream.contiguous(), grad, *ctx.places, **ctx.tile)
        return grad, None, None, None


def fused_feature_distance(student: torch.Tensor, teacher: torch.Tensor, least: float, tiny: float) -> torch.Tensor:
    """`qvit.distill.features.feature_distance`.

    Args:
        student, teacher: [B, N, C], floating point, of any strides.
        least: share of the mean variance that a channel's counts with at least.
        tiny: least variance.

    Returns:
        A scalar, float32. Gradients reach the student.
    """
    with torch.autocast(student.device.type, enabled=False):
        return _Distance.apply(student, teacher.detach(), least, tiny)
