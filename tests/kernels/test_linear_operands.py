"""What is folded into weight and bias of a linear layer on codes, and the sums, against PyTorch in float64."""

from __future__ import annotations

import pytest
import torch

from .helpers import close


@pytest.mark.parametrize(("rows", "columns"), [(5, 23), (3, 1537), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_and_unfold(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    from qvit.kernels.linear_operands import fold, unfold

    weight = torch.randn(rows, columns, device=device).to(dtype)
    scale, offset, bias = torch.rand(1, device=device), torch.randn(columns, device=device), torch.randn(rows, device=device)
    digits = 1e-5 if dtype == torch.float32 else 2**-7  # the interpreter cuts bfloat16 off
    for given in (bias, bias.to(dtype), None):
        operand, shift = fold(weight, scale, offset, given)
        assert operand.dtype == shift.dtype == dtype
        close(operand, weight.double() * scale.double(), digits)
        close(shift, weight.double() @ offset.double() + (0 if given is None else given.double()), digits)
    sums = torch.randn(rows, device=device)
    grad = unfold(weight, scale, offset, sums)
    assert grad.dtype == dtype
    close(grad, weight.double() * scale.double() + sums.double()[:, None] * offset.double(), digits)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (255, 33), (1031, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_sums(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    from qvit.kernels.linear_operands import column_sums

    x = torch.randn(rows, columns, device=device).to(dtype)
    got = column_sums(x)
    assert got.dtype == torch.float32
    close(got, x.double().sum(0), 1e-5)
