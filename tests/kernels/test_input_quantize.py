"""The kernel itself: codes at the borders of tiles and of the range, halves, and every element written."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize("shape", [(1, 1), (33, 127), (256 + 7, 128 + 1)])
def test_codes_equal_rounding_in_float64(shape: tuple[int, int], device: torch.device) -> None:
    from qvit.kernels.input_quantize import quantize_input

    # Eighths are exact, so that halves are really halves and have to go to the even code.
    x = torch.randint(-40, 40, shape, device=device) / 8
    scale, offset = torch.tensor([0.25], device=device), torch.randint(-4, 4, shape[1:], device=device) / 8
    codes = quantize_input(x, scale, offset, -2, 5, "none", torch.bfloat16)
    want = ((x.double() - offset.double()) / 0.25).round().clamp(-2, 5)
    assert torch.equal(codes.double(), want)


def test_gradients_are_lsqs_and_all_written(device: torch.device) -> None:
    from qvit.kernels.input_quantize import quantize_input_backward

    x = torch.tensor([[-3.0, 0.3, 1.2, 9.0]], device=device).repeat(300, 1)
    grad = torch.ones_like(x)
    scale, offset = torch.ones(1, device=device), torch.zeros(4, device=device)
    grad_x, grad_scale, grad_offset = quantize_input_backward(grad, x, scale, offset, 0, 3, "none")
    assert torch.equal(grad_x, torch.tensor([[0.0, 1.0, 1.0, 0.0]], device=device).repeat(300, 1))
    torch.testing.assert_close(grad_scale, torch.tensor([300 * (0 - 0.3 + (1 - 1.2) + 3)], device=device))
    torch.testing.assert_close(grad_offset, torch.tensor([300.0, 0, 0, 300.0], device=device))
