"""The small operands of a linear layer on codes: what `qvit.kernels.linear` folds into its weight and bias, and back.

Each is one pass over a weight, or over the rows of a gradient; plain PyTorch takes several, most of them too short for a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS, _COLUMNS = 4, 1024  # a tile of a weight
_SUMMED_ROWS, _SUMMED_COLUMNS = 16, 128  # a tile of rows to be summed
_TILES_A_PROGRAM = 16  # of them, one below the other, so that sums stay in registers


@triton.jit
def _fold(
    w_ptr,
    scale_ptr,
    offset_ptr,
    bias_ptr,
    operand_ptr,
    shift_ptr,
    rows,
    columns,
    HAS_BIAS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    r = tl.program_id(0) * R + tl.arange(0, R)
    first = r.to(tl.int64)[:, None] * columns
    scale = tl.load(scale_ptr)
    sums = tl.zeros((R, C), tl.float32)
    for start in range(0, columns, C):
        c = start + tl.arange(0, C)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        w = tl.load(w_ptr + first + c[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += w * tl.load(offset_ptr + c, mask=c < columns, other=0.0)[None, :]
        tl.store(operand_ptr + first + c[None, :], (w * scale).to(operand_ptr.dtype.element_ty), mask=mask)
    shift = tl.sum(sums, 1)
    if HAS_BIAS:
        shift += tl.load(bias_ptr + r, mask=r < rows, other=0.0).to(tl.float32)
    tl.store(shift_ptr + r, shift.to(shift_ptr.dtype.element_ty), mask=r < rows)


@triton.jit
def _unfold(products_ptr, scale_ptr, offset_ptr, sums_ptr, grad_ptr, rows, columns, R: tl.constexpr, C: tl.constexpr):
    r = tl.program_id(0) * R + tl.arange(0, R)
    c = tl.program_id(1) * C + tl.arange(0, C)
    mask = (r < rows)[:, None] & (c < columns)[None, :]
    where = r.to(tl.int64)[:, None] * columns + c[None, :]
    product = tl.load(products_ptr + where, mask=mask, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    total = tl.load(sums_ptr + r, mask=r < rows, other=0.0)[:, None]
    grad = product + total * tl.load(offset_ptr + c, mask=c < columns, other=0.0)[None, :]
    tl.store(grad_ptr + where, grad.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _column_sums(x_ptr, sums_ptr, rows, columns, R: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr):
    c = tl.program_id(1) * C + tl.arange(0, C)
    sums = tl.zeros((R, C), tl.float32)
    for tile in range(TILES):
        start = (tl.program_id(0) * TILES + tile) * R
        r = start + tl.arange(0, R)
        where = start.to(tl.int64) * columns + tl.arange(0, R)[:, None] * columns + c[None, :]
        sums += tl.load(x_ptr + where, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0) * columns + c, tl.sum(sums, 0), mask=c < columns)


def _tile(columns: int) -> dict[str, int]:
    return {"R": _ROWS, "C": min(triton.next_power_of_2(columns), _COLUMNS)}


def fold(
    weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``scale * weight`` and ``weight offset + bias``, in the type of the weight.

    Args:
        weight: [M, K], contiguous.
        scale: of the input, float32 [1].
        offset: of the input, float32 [K].
        bias: [M] or ``None``.

    Returns:
        [M, K] and [M].
    """
    rows, columns = weight.shape
    operand = torch.empty_like(weight)
    shift = torch.empty(rows, dtype=weight.dtype, device=weight.device)
    given = offset if bias is None else bias.contiguous()
    grid = (triton.cdiv(rows, _ROWS),)
    _fold[grid](weight, scale, offset, given, operand, shift, rows, columns, HAS_BIAS=bias is not None, **_tile(columns))
    return operand, shift


def unfold(products: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """The gradient of a weight from that of the folded one: ``scale * products + sums offset^T``.

    Args:
        products: gradient rows^T codes, [M, K], contiguous.
        scale, offset: as in `fold`.
        sums: of the gradient's rows, float32 [M].

    Returns:
        [M, K], in the type of the products.
    """
    rows, columns = products.shape
    grad = torch.empty_like(products)
    tile = _tile(columns)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, tile["C"]))
    _unfold[grid](products, scale, offset, sums, grad, rows, columns, **tile)
    return grad


def column_sums(x: torch.Tensor) -> torch.Tensor:
    """x [rows, M], contiguous -> its sum over rows, float32 [M]."""
    rows, columns = x.shape
    programs = triton.cdiv(rows, _SUMMED_ROWS * _TILES_A_PROGRAM)
    sums = torch.empty((programs, columns), dtype=torch.float32, device=x.device)
    grid = (programs, triton.cdiv(columns, _SUMMED_COLUMNS))
    _column_sums[grid](x, sums, rows, columns, R=_SUMMED_ROWS, C=_SUMMED_COLUMNS, TILES=_TILES_A_PROGRAM)
    return sums.sum(0)
