"""DGD against the formula that forms the N x N matrices."""

from __future__ import annotations

import math

import pytest
import torch

from qvit.distill import dgd_loss, similarity_distance
from qvit.errors import TrainingError


def direct(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """|| G_t - G_s || with N x N matrices, float64, as method and paper write it."""

    def similarity(x: torch.Tensor) -> torch.Tensor:
        g = x.double() @ x.double().transpose(-2, -1)
        return g / g.square().sum((-2, -1), keepdim=True).sqrt()

    return (similarity(teacher) - similarity(student)).square().sum((-2, -1)).sqrt()


@pytest.mark.parametrize("n", [197, 50, 5, 2, 1])
@pytest.mark.parametrize(("d_student", "d_teacher"), [(64, 64), (3, 3), (16, 64), (31, 7), (1, 5)])
def test_equals_the_formula_with_token_by_token_matrices(n: int, d_student: int, d_teacher: int) -> None:
    student, teacher = torch.randn(2, 3, n, d_student), torch.randn(2, 3, n, d_teacher)
    got = similarity_distance(student, teacher)
    assert got.shape == (2, 3)
    assert got.dtype == torch.float32
    # One token has G = 1 in both models: there, rounding is all there is, and the chord keeps it below 1e-3.
    torch.testing.assert_close(got.double(), direct(student, teacher), rtol=1e-5, atol=1e-5 if n > 1 else 1e-3)


def test_float64_inputs_are_computed_in_float64() -> None:
    student, teacher = torch.randn(1, 2, 33, 8, dtype=torch.float64), torch.randn(1, 2, 33, 8, dtype=torch.float64)
    got = similarity_distance(student, teacher)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, direct(student, teacher), rtol=1e-12, atol=0)


def test_small_distances_keep_three_digits() -> None:
    teacher = torch.randn(4, 2, 60, 16, dtype=torch.float64)
    student = teacher + 0.02 * torch.randn_like(teacher)
    want = direct(student, teacher)
    assert want.min() > 0.005
    assert want.max() < 0.05
    torch.testing.assert_close(similarity_distance(student.float(), teacher.float()).double(), want, rtol=1e-3, atol=0)


def test_gradcheck_of_both_arguments() -> None:
    student = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(similarity_distance, (student, teacher))


def test_gradient_equals_that_of_the_direct_formula() -> None:
    student = torch.randn(2, 3, 29, 8, requires_grad=True)
    teacher = torch.randn(2, 3, 29, 16)
    (got,) = torch.autograd.grad(similarity_distance(student, teacher).sum(), student)
    (want,) = torch.autograd.grad(direct(student, teacher).sum(), student)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-12, 1e12])
def test_scale_does_not_count_and_equal_similarities_have_distance_and_gradient_zero(scale: float) -> None:
    teacher = torch.randn(2, 30, 40, 16)
    student = (teacher * scale).requires_grad_()
    distance = similarity_distance(student, teacher)
    assert distance.min() >= 0
    assert distance.max() < 1e-3
    distance.sum().backward()
    assert torch.isfinite(student.grad).all()
    assert (student.grad * scale).abs().max() < 1e-2

    other = torch.randn(2, 30, 40, 16)
    torch.testing.assert_close(
        similarity_distance(other * scale, teacher), similarity_distance(other, teacher), rtol=1e-5, atol=0
    )


def test_identical_tensors_give_a_finite_small_gradient() -> None:
    teacher = torch.randn(2, 3, 197, 64)
    student = teacher.clone().requires_grad_()
    similarity_distance(student, teacher).sum().backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1e-3


def test_orthogonal_similarities_and_zeros_are_sqrt_two_apart() -> None:
    one, two, zero = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2, requires_grad=True)
    one[..., :2, 0] = 1.0
    two[..., 2:, 1] = 5.0
    torch.testing.assert_close(similarity_distance(one, two).item(), math.sqrt(2), rtol=1e-6, atol=0)
    distance = similarity_distance(zero, two)
    torch.testing.assert_close(distance.item(), math.sqrt(2), rtol=1e-6, atol=0)
    distance.sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_autocast_does_not_reach_inside() -> None:
    student, teacher = torch.randn(1, 2, 37, 8), torch.randn(1, 2, 37, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = similarity_distance(student, teacher)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, similarity_distance(student, teacher), rtol=0, atol=0)


def taps(
    blocks: int = 2, batch: int = 3, heads: int = 2, tokens: int = 9, width: int = 4
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(batch, heads, tokens, width), torch.randn(batch, heads, tokens, width)) for _ in range(blocks)]


def test_loss_sums_blocks_heads_q_and_k_and_averages_the_batch() -> None:
    student, teacher = taps(), taps(width=6)
    want = sum(direct(s, t).sum() for pair in zip(student, teacher, strict=True) for s, t in zip(*pair, strict=True)) / 3
    got = dgd_loss(student, teacher)
    assert got.shape == ()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"blocks": 3}, "3 blocks|teacher's 3"),
        ({"heads": 3}, "heads"),
        ({"tokens": 10}, "tokens"),
        ({"batch": 1}, "images"),
    ],
)
def test_models_that_do_not_compare_are_refused(other: dict[str, int], named: str) -> None:
    with pytest.raises(TrainingError, match=named) as error:
        dgd_loss(taps(), taps(**other))
    assert "\n" not in str(error.value)


def test_no_taps_are_refused() -> None:
    with pytest.raises(TrainingError):
        dgd_loss([], [])
