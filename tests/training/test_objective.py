"""The loss of student and teacher on a batch: what it reads of both, and what stays behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from qvit.distill import DistillationLoss, FeatureTap, tap_queries_keys
from qvit.errors import TrainingError
from qvit.training.objective import Objective
from qvit.training.setup import Setup

Factory = Callable[..., Any]
CPU = torch.device("cpu")


@pytest.fixture
def batch(make_student: Factory, small_vit: Factory) -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    """Student, teacher, images and labels."""
    teacher = small_vit().eval()
    student = make_student(teacher, weight_bits=4, act_bits=4)
    info = student.qvit.architecture
    return student, teacher, torch.randn(3, info.in_chans, *info.img_size), torch.tensor([0, 1, 2])


def _objective(student: nn.Module, teacher: nn.Module | None, loss: DistillationLoss, bf16: bool = False) -> Objective:
    setup: Any = Setup(student, teacher, loss, None, *[None] * 4)  # type: ignore[arg-type]
    return Objective(setup, bool(loss.feature), "all", CPU, bf16)


def test_the_loss_gets_logits_taps_and_features(batch: Any) -> None:
    student, teacher, images, labels = batch
    loss = DistillationLoss(label=0.3, hard=0, soft=0.5, dgd=0.7, feature=0.9)
    objective = _objective(student, teacher, loss)
    with objective.attached():
        total, terms = objective(images, labels, None)
    assert terms.keys() == {"label", "soft", "dgd", "feature"}
    blocks = range(len(teacher.blocks) - 1)
    taps = [tap_queries_keys(student), tap_queries_keys(teacher), FeatureTap(student, blocks), FeatureTap(teacher, blocks)]
    with torch.no_grad():
        answer, logits = teacher(images), student(images)
        expected, _ = loss(logits, labels, answer, *[tap.collect() for tap in taps])  # type: ignore[arg-type]
    for tap in taps:
        tap.close()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    total.backward()
    assert student.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_pass_that_the_loss_did_not_read_leaves_nothing_once_cleared(batch: Any) -> None:
    student, teacher, images, labels = batch
    objective = _objective(student, teacher, DistillationLoss(dgd=1, feature=1))
    with objective.attached():
        student(images[:1])
        objective.clear()
        with pytest.raises(TrainingError, match="no queries and keys to collect"):
            objective._taps[0].collect()
        assert objective(images, labels, None)[0].isfinite()
        assert not [tap for tap in (*objective._taps, *objective._features) if tap._taken]
    student(images)
    assert not [tap for tap in (*objective._taps, *objective._features) if tap._taken]


def test_a_teacher_that_was_asked_before_is_not_asked_again(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, images, labels = batch
    objective = _objective(student, teacher, DistillationLoss(label=0, hard=0, soft=1))
    answer = objective.ask(teacher, images)
    assert not answer.requires_grad
    with objective.attached():
        expected = objective(images, labels, None)[0]
        monkeypatch.setattr(teacher, "forward", None)
        assert torch.equal(objective(images, labels, answer)[0], expected)


def test_bfloat16_is_for_student_and_teacher(batch: Any) -> None:
    student, teacher, images, labels = batch
    objective = _objective(student, teacher, DistillationLoss(label=0, hard=0, soft=1), bf16=True)
    assert objective.ask(teacher, images).dtype == torch.bfloat16
    with objective.attached():
        assert objective(images, labels, None)[0].dtype == torch.float32


def test_labels_need_no_teacher(batch: Any) -> None:
    student, _, images, labels = batch
    objective = _objective(student, None, DistillationLoss(label=1, hard=0))
    with objective.attached():
        total, terms = objective(images, labels, None)
    assert terms.keys() == {"label"}
    assert torch.equal(total, torch.nn.functional.cross_entropy(student(images), labels))
