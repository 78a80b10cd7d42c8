"""Feature matching: the tap and the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qvit.distill.features import FeatureTap, feature_loss
from qvit.errors import TrainingError


@pytest.mark.parametrize("quantized", [False, True])
def test_the_tap_keeps_what_the_head_reads(
    quantized: bool, small_vit: Callable[..., nn.Module], make_student: Callable[..., nn.Module]
) -> None:
    model = make_student() if quantized else small_vit()
    images = torch.randn(3, 3, 48, 48)
    with FeatureTap(model) as tap:
        logits = model(images)
        features = tap.collect()
        assert features.shape == (3, 10, 48)
        assert features.requires_grad
        torch.testing.assert_close(model.forward_head(features), logits)
        with pytest.raises(TrainingError, match="run the tapped model"):
            tap.collect()
        model(images)
        tap.clear()
        with pytest.raises(TrainingError, match="run the tapped model"):
            tap.collect()
    model(images)
    with pytest.raises(TrainingError):
        tap.collect()


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(TrainingError, match="Sequential has no features"):
        FeatureTap(nn.Sequential(nn.Linear(2, 2)))


def test_the_loss_is_relative_and_does_not_pull_on_the_teacher() -> None:
    teacher = torch.randn(2, 5, 7, requires_grad=True)
    student = teacher.detach().clone().requires_grad_()
    assert feature_loss(student, teacher).item() == 0
    assert feature_loss(torch.zeros(2, 5, 7), teacher).item() == pytest.approx(1)
    noise = torch.randn(2, 5, 7)
    small, large = feature_loss(teacher + 0.1 * noise, teacher), feature_loss(10 * teacher + noise, 10 * teacher)
    assert small.item() == pytest.approx(large.item(), rel=1e-4)
    want = (0.1 * noise.double()).square().sum() / teacher.double().square().sum()
    assert small.item() == pytest.approx(want.item(), rel=1e-4)
    feature_loss(student + 0.1 * noise, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert feature_loss(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_other_shapes_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"features are \[1, 2, 3\] and the teacher's \[1, 2, 4\]"):
        feature_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
