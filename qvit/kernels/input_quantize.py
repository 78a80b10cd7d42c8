"""Quantizing the input of a linear layer, with the activation in front of it: one pass forward, one pass backward.

Plain counterpart: `qvit.quantizers.lsq.LSQQuantizer` behind ``torch.nn.GELU`` (and its kin).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qvit.kernels.arithmetic import activation, activation_slope, quantize

_ROWS, _COLUMNS = 8, 128  # a tile
_TILES_A_PROGRAM = 32  # of the backward pass, one below the other, so that sums over rows stay in registers


@triton.jit
def _quantize_input(
    x_ptr, scale_ptr, offset_ptr, codes_ptr, rows, columns, qn, qp, KIND: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * C + tl.arange(0, C)
    first = (tl.program_id(0) * R).to(tl.int64) * columns
    where = tl.arange(0, R)[:, None] * columns + c[None, :]
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    x = activation(tl.load(x_ptr + first + where, mask=mask, other=0.0).to(tl.float32), KIND)
    offset = tl.load(offset_ptr + c, mask=c < columns, other=0.0)
    _, code, _ = quantize(x, 1.0 / tl.load(scale_ptr), offset[None, :], qn, qp)
    tl.store(codes_ptr + first + where, code.to(codes_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _quantize_input_backward(
    grad_ptr,
    x_ptr,
    scale_ptr,
    offset_ptr,
    grad_x_ptr,
    scale_sums_ptr,
    offset_sums_ptr,
    rows,
    columns,
    qn,
    qp,
    KIND: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    TILES: tl.constexpr,
):
    c = tl.program_id(1) * C + tl.arange(0, C)
    inverse_scale = 1.0 / tl.load(scale_ptr)
    offset = tl.load(offset_ptr + c, mask=c < columns, other=0.0)[None, :]
    scale_sums = tl.zeros((R, C), dtype=tl.float32)
    offset_sums = tl.zeros((R, C), dtype=tl.float32)
    for tile in range(TILES):
        start = (tl.program_id(0) * TILES + tile) * R
        r = start + tl.arange(0, R)
        first = start.to(tl.int64) * columns
        where = tl.arange(0, R)[:, None] * columns + c[None, :]
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        raw = tl.load(x_ptr + first + where, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + first + where, mask=mask, other=0.0).to(tl.float32)
        v, code, inside = quantize(activation(raw, KIND), inverse_scale, offset, qn, qp)
        passed = tl.where(inside, grad, 0.0)
        scale_sums += grad * tl.where(inside, code - v, code)
        offset_sums += grad - passed
        grad_x = passed * activation_slope(raw, KIND)
        tl.store(grad_x_ptr + first + where, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    where = tl.program_id(0) * columns + c
    tl.store(scale_sums_ptr + where, tl.sum(scale_sums, 0), mask=c < columns)
    tl.store(offset_sums_ptr + where, tl.sum(offset_sums, 0), mask=c < columns)


def quantize_input(
    x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, qn: int, qp: int, kind: str, dtype: torch.dtype
) -> torch.Tensor:
    """Codes of ``activation(x)``.

    Args:
        x: [.., K], contiguous.
        scale: float32 [1].
        offset: float32 [K].
        qn, qp: smallest and largest code.
        kind: of `qvit.kernels.arithmetic.activation`.
        dtype: of the codes.

    Returns:
        [.., K].
    """
    columns = x.shape[-1]
    rows = x.numel() // columns
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    _quantize_input[grid](x, scale, offset, codes, rows, columns, qn, qp, KIND=kind, R=_ROWS, C=_COLUMNS)
    return codes


def quantize_input_backward(
    grad: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, qn: int, qp: int, kind: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x [.., K] (in its type), scale [1] and offset [K] (float32), from that of the values [.., K], contiguous."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    programs = triton.cdiv(rows, _ROWS * _TILES_A_PROGRAM)
    grad_x = torch.empty_like(x)
    scale_sums, offset_sums = torch.empty((2, programs, columns), dtype=torch.float32, device=x.device)
    _quantize_input_backward[(programs, triton.cdiv(columns, _COLUMNS))](
        grad,
        x,
        scale,
        offset,
        grad_x,
        scale_sums,
        offset_sums,
        rows,
        columns,
        qn,
        qp,
        KIND=kind,
        R=_ROWS,
        C=_COLUMNS,
        TILES=_TILES_A_PROGRAM,
    )
    return grad_x, scale_sums.sum().reshape(1), offset_sums.sum(0)
