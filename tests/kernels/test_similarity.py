"""The fused DGD distance against the plain one in float64."""

from __future__ import annotations

import pytest
import torch

from qvit.distill.similarity import similarity_distance

from .helpers import compare


@pytest.mark.parametrize(
    ("b", "h", "n", "ds", "dt"), [(2, 3, 17, 8, 8), (1, 2, 131, 64, 32), (2, 1, 1, 16, 16), (1, 1, 65, 24, 48)]
)
@pytest.mark.parametrize("noise", [3.0, 0.05])
def test_equals_the_plain_distance(b: int, h: int, n: int, ds: int, dt: int, noise: float, device: torch.device) -> None:
    from qvit.kernels.similarity import fused_similarity_distance

    teacher = torch.randn(b, h, n, dt)
    student = noise * torch.randn(b, h, n, ds)
    student[..., : min(ds, dt)] += teacher[..., : min(ds, dt)]
    # n = 1: every similarity is the same 1 x 1 matrix, the distance is rounding, and its gradient zero.
    compare(
        lambda s: fused_similarity_distance(s, teacher.to(device), 1e-6, 1e-30),
        lambda s: similarity_distance(s, teacher.double()),
        [student],
        device,
        digits=2e-3 if n > 1 else 1e3,
    )


def test_reads_any_strides_and_keeps_the_students(device: torch.device) -> None:
    from qvit.kernels.similarity import fused_similarity_distance

    b, h, n, d = 2, 3, 19, 16
    qkv = torch.randn(b, n, 3, h, d)
    flat = torch.randn(b, n, h, d)
    compare(
        lambda s: fused_similarity_distance(s.transpose(1, 2), qkv.to(device)[:, :, 1].transpose(1, 2), 1e-6, 1e-30),
        lambda s: similarity_distance(s.transpose(1, 2), qkv.double()[:, :, 1].transpose(1, 2)),
        [flat],
        device,
        digits=2e-4,
    )


def test_equal_similarities_have_no_gradient(device: torch.device) -> None:
    from qvit.kernels.similarity import fused_similarity_distance

    x = torch.randn(1, 2, 33, 16, device=device)
    student = (2 * x).requires_grad_()
    distance = fused_similarity_distance(student, x, 1e-6, 1e-30)
    distance.sum().backward()
    assert distance.max() < 1e-3
    assert student.grad.abs().max() < 1e-2
