"""Feature matching: the tap and the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qvit.distill.features import FeatureTap, feature_distance, feature_loss
from qvit.errors import TrainingError


@pytest.mark.parametrize("quantized", [False, True])
def test_the_tap_keeps_what_the_head_reads(
    quantized: bool, small_vit: Callable[..., nn.Module], make_student: Callable[..., nn.Module]
) -> None:
    model = make_student() if quantized else small_vit()
    images = torch.randn(3, 3, 48, 48)
    with FeatureTap(model) as tap:
        logits = model(images)
        (features,) = tap.collect()
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


def test_the_tap_keeps_blocks_in_order(small_vit: Callable[..., nn.Module]) -> None:
    model = small_vit(depth=3)
    images = torch.randn(2, 3, 48, 48)
    with FeatureTap(model, [0, 1]) as tap:
        model(images)
        taken = tap.collect()
        assert len(taken) == 3
        torch.testing.assert_close(model.blocks[1](taken[0]), taken[1])
        torch.testing.assert_close(model.norm(model.blocks[2](taken[1])), taken[2])


def test_the_distance_is_the_share_of_variance_that_is_missed() -> None:
    # Channels of very different sizes and means count alike.
    size, mean = torch.tensor([100.0, 1.0, 0.5]), torch.tensor([1000.0, 0.0, -3.0])
    teacher = (torch.randn(4, 50, 3) * size + mean).requires_grad_()
    student = teacher.detach().clone().requires_grad_()
    assert feature_distance(student, teacher).item() == 0
    noise = 0.1 * torch.randn(4, 50, 3) * size
    double = teacher.detach().double()
    variance = double.var((0, 1), unbiased=False)
    variance = variance.clamp_min(0.01 * variance.mean())
    want = (noise.double().square().mean((0, 1)) / variance).mean()
    assert feature_distance(teacher + noise, teacher).item() == pytest.approx(want.item(), rel=1e-4)
    feature_distance(student + noise, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert feature_distance(student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


def test_one_that_only_knows_the_mean_misses_all_and_a_constant_teacher_is_no_trouble() -> None:
    teacher = torch.randn(4, 50, 3) * torch.tensor([1.0, 2.0, 3.0]) + 5
    assert feature_distance(teacher.mean((0, 1)).expand_as(teacher), teacher).item() == pytest.approx(1, rel=1e-4)
    assert feature_distance(torch.ones(2, 3, 4), torch.ones(2, 3, 4)).item() == 0
    assert torch.isfinite(feature_distance(torch.zeros(2, 3, 4), torch.ones(2, 3, 4)))


def test_the_loss_is_the_mean_over_places() -> None:
    student, teacher = torch.randn(2, 2, 5, 7), torch.randn(2, 2, 5, 7)
    want = (feature_distance(student[0], teacher[0]) + feature_distance(student[1], teacher[1])) / 2
    assert feature_loss(list(student), list(teacher)).item() == pytest.approx(want.item())
    with pytest.raises(ValueError, match="zip"):
        feature_loss([student[0]], list(teacher))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"features are \[1, 2, 3\] and the teacher's \[1, 2, 4\]"):
        feature_distance(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))


def test_maps_are_flattened_and_the_blocks_of_all_stages_kept(small_swin: Callable[..., nn.Module]) -> None:
    model = small_swin()
    images = torch.randn(2, 3, 32, 32)
    with FeatureTap(model, [0, 1]) as tap:
        model(images)
        first, second, last = tap.collect()
    assert (first.shape, second.shape, last.shape) == ((2, 64, 16), (2, 64, 16), (2, 16, 32))
    again = model.layers[0].blocks[1](first.view(2, 8, 8, 16))
    torch.testing.assert_close(again.flatten(1, 2), second)
    torch.testing.assert_close(model.norm(model.layers[1](again)).flatten(1, 2), last)
    assert feature_loss([first, second, last], [first, second, last]).item() == 0
