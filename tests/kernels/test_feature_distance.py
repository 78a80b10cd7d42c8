"""The fused distance of features against the plain one in float64."""

from __future__ import annotations

import pytest
import torch

from qvit.distill.features import feature_distance

from .helpers import close, compare

LEAST, TINY = 0.01, 1e-12


@pytest.mark.parametrize(("b", "n", "c"), [(2, 17, 24), (3, 131, 130), (1, 1, 8), (5, 1, 33), (2, 257, 384)])
def test_equals_the_plain_distance(b: int, n: int, c: int, device: torch.device) -> None:
    from qvit.kernels.feature_distance import fused_feature_distance

    teacher = torch.randn(b, n, c) * torch.logspace(-2, 1, c)
    teacher[..., 0] = 3.0  # no variance at all
    compare(
        lambda s: fused_feature_distance(s, teacher.to(device), LEAST, TINY),
        lambda s: feature_distance(s, teacher.double()),
        [teacher + 0.3 * torch.randn(b, n, c)],
        device,
        digits=2e-5,
    )


def test_a_large_mean_does_not_cancel_a_small_variance(device: torch.device) -> None:
    from qvit.kernels.feature_distance import fused_feature_distance

    teacher = (100 + 0.1 * torch.randn(4, 150, 20)).to(device)
    student = teacher + 0.05 * torch.randn_like(teacher)
    got = fused_feature_distance(student, teacher, LEAST, TINY)
    variance = teacher.double().var((0, 1), unbiased=False)
    want = ((student.double() - teacher.double()).square().mean((0, 1)) / variance).mean()
    close(got, want, 1e-4)


def test_reads_slices_and_gives_gradients_of_the_students_type(device: torch.device) -> None:
    from qvit.kernels.feature_distance import fused_feature_distance

    whole, other = torch.randn(2, 12, 40), torch.randn(2, 30, 11)
    compare(
        lambda s: fused_feature_distance(s[:, 1:], other.to(device).transpose(1, 2)[..., 2:22].repeat(1, 1, 2), LEAST, TINY),
        lambda s: feature_distance(s[:, 1:], other.double().transpose(1, 2)[..., 2:22].repeat(1, 1, 2)),
        [whole],
        device,
    )
    teacher = torch.randn(2, 9, 6).transpose(1, 2)  # channels lie apart
    compare(
        lambda s: fused_feature_distance(s, teacher.to(device), LEAST, TINY),
        lambda s: feature_distance(s, teacher.double()),
        [torch.randn(2, 6, 9)],
        device,
    )
    student = whole.detach().to(device, torch.bfloat16).requires_grad_()
    fused_feature_distance(student, whole.detach().to(device) + 1, LEAST, TINY).backward()
    assert student.grad.dtype == torch.bfloat16
