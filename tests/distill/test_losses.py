"""The distillation loss against formulas written out in float64."""

from __future__ import annotations

import math

import pytest
import torch

from qvit.distill import DistillationLoss, tap_queries_keys
from qvit.distill.features import feature_distance
from qvit.errors import RecipeError, TrainingError

STUDENT = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
SECOND = torch.tensor([[-1.0, 0.0, 2.0], [0.5, 0.25, 0.125]])
TEACHER = torch.tensor([[2.0, 0.0, 2.5], [4.0, 1.0, 0.0]])
LABELS = torch.tensor([0, 1])


def log_softmax(row: list[float]) -> list[float]:
    total = math.log(sum(math.exp(v) for v in row))
    return [v - total for v in row]


def cross_entropy(logits: torch.Tensor, targets: list[int]) -> float:
    return -sum(log_softmax(row)[t] for row, t in zip(logits.tolist(), targets, strict=True)) / len(targets)


def divergence(student: torch.Tensor, teacher: torch.Tensor, t: float) -> float:
    total = 0.0
    for s_row, t_row in zip((student / t).tolist(), (teacher / t).tolist(), strict=True):
        total += sum(math.exp(lt) * (lt - ls) for ls, lt in zip(log_softmax(s_row), log_softmax(t_row), strict=True))
    return t * t * total / len(student)


def test_papers_loss_is_half_label_half_teacher() -> None:
    total, parts = DistillationLoss(label=0.5, hard=0.5)(STUDENT, LABELS, TEACHER)
    assert set(parts) == {"label", "hard"}
    assert parts["label"].item() == pytest.approx(cross_entropy(STUDENT, [0, 1]), rel=1e-6)
    assert parts["hard"].item() == pytest.approx(cross_entropy(STUDENT, [2, 0]), rel=1e-6)
    assert total.item() == pytest.approx((cross_entropy(STUDENT, [0, 1]) + cross_entropy(STUDENT, [2, 0])) / 2, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 0.5])
def test_soft_term_is_the_divergence_times_temperature_squared(temperature: float) -> None:
    total, parts = DistillationLoss(label=0, hard=0, soft=2.0, temperature=temperature)(STUDENT, None, TEACHER)
    assert parts["soft"].item() == pytest.approx(divergence(STUDENT, TEACHER, temperature), rel=1e-5)
    assert total.item() == pytest.approx(2 * divergence(STUDENT, TEACHER, temperature), rel=1e-5)
    same, _ = DistillationLoss(label=0, hard=0, soft=1.0, temperature=temperature)(TEACHER, None, TEACHER)
    assert same.item() == pytest.approx(0, abs=1e-6)


def test_two_heads_label_reads_the_first_and_the_teacher_the_second() -> None:
    _, parts = DistillationLoss(label=1, hard=1, soft=1)((STUDENT, SECOND), LABELS, TEACHER)
    assert parts["label"].item() == pytest.approx(cross_entropy(STUDENT, [0, 1]), rel=1e-6)
    assert parts["hard"].item() == pytest.approx(cross_entropy(SECOND, [2, 0]), rel=1e-6)
    assert parts["soft"].item() == pytest.approx(divergence(SECOND, TEACHER, 1.0), rel=1e-5)


def test_soft_targets_are_probabilities() -> None:
    mixed = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]])
    total, _ = DistillationLoss(label=1, hard=0)(STUDENT, mixed)
    want = -sum(
        p * lp
        for ps, row in zip(mixed.tolist(), STUDENT.tolist(), strict=True)
        for p, lp in zip(ps, log_softmax(row), strict=True)
    )
    assert total.item() == pytest.approx(want / 2, rel=1e-6)
    # probabilities of one are the labels
    one_hot, _ = DistillationLoss(label=1, hard=0)(STUDENT, torch.nn.functional.one_hot(LABELS, 3).float())
    assert one_hot.item() == pytest.approx(cross_entropy(STUDENT, [0, 1]), rel=1e-6)


def test_dgd_has_its_weight_and_leaves_the_teacher_alone() -> None:
    logits = STUDENT.clone().requires_grad_()
    student = [(torch.randn(2, 2, 5, 4, requires_grad=True), torch.randn(2, 2, 5, 4))]
    teacher = [(torch.randn(2, 2, 5, 4, requires_grad=True), torch.randn(2, 2, 5, 4))]
    total, parts = DistillationLoss(label=1, hard=0, dgd=3.0)(logits, LABELS, None, student, teacher)
    assert total.item() == pytest.approx((parts["label"] + 3 * parts["dgd"]).item(), rel=1e-6)
    assert not parts["dgd"].requires_grad
    total.backward()
    assert logits.grad is not None
    assert student[0][0].grad is not None
    assert teacher[0][0].grad is None


def test_features_have_their_weight_and_need_a_teacher_but_not_its_answer() -> None:
    student, teacher = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)
    loss = DistillationLoss(label=1, hard=0, feature=3.0)
    assert loss.needs_teacher
    assert not loss.needs_taps
    total, parts = loss(STUDENT, LABELS, student_features=[student], teacher_features=[teacher])
    want = feature_distance(student, teacher).item()
    assert parts["feature"].item() == pytest.approx(want, rel=1e-5)
    assert total.item() == pytest.approx((parts["label"] + 3 * parts["feature"]).item(), rel=1e-6)


def test_terms_of_weight_zero_are_not_computed() -> None:
    nan = torch.full_like(TEACHER, math.nan)
    total, parts = DistillationLoss(label=1, hard=0, soft=0, dgd=0)(STUDENT, LABELS, nan)
    assert set(parts) == {"label"}
    assert torch.isfinite(total)
    assert DistillationLoss(label=1, hard=0).needs_teacher is False
    assert DistillationLoss(label=1, hard=0, dgd=1).needs_teacher
    assert DistillationLoss(label=1, hard=0, dgd=1).needs_taps
    assert DistillationLoss(label=0, soft=1).needs_teacher
    assert not DistillationLoss(label=0, soft=1).needs_taps


def test_half_precision_logits_are_lifted_to_float32() -> None:
    total, _ = DistillationLoss(label=1, hard=1, soft=1)(STUDENT.bfloat16(), LABELS, TEACHER.bfloat16())
    assert total.dtype == torch.float32


@pytest.mark.parametrize(
    "weights",
    [
        {"label": -1.0},
        {"dgd": -0.1},
        {"feature": -0.1},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"label": 0, "hard": 0, "soft": 0, "dgd": 0, "feature": 0},
        {"soft": math.nan},
        {"soft": math.inf},
        {"hard": "half"},
        {"hard": True},
    ],
)
def test_bad_weights_are_refused_in_one_sentence(weights: dict) -> None:
    with pytest.raises(RecipeError) as error:
        DistillationLoss(**weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("loss", "arguments"),
    [
        ({"hard": 1}, (STUDENT, LABELS, None)),
        ({"label": 0, "hard": 0, "soft": 1}, (STUDENT, None, None)),
        ({"hard": 0, "dgd": 1}, (STUDENT, LABELS, TEACHER)),
        ({"label": 1}, (STUDENT, None, TEACHER)),
        ({"hard": 0, "feature": 1}, (STUDENT, LABELS, TEACHER)),
        ({"hard": 1}, (STUDENT, LABELS, TEACHER[:, :2])),
    ],
)
def test_missing_ingredients_are_named(loss: dict, arguments: tuple) -> None:
    with pytest.raises(TrainingError):
        DistillationLoss(**loss)(*arguments)


def test_with_a_distilled_deit(small_vit, make_student) -> None:
    """timm's distilled training gives both heads, and every parameter of the student gets a gradient."""
    teacher = small_vit("deit_tiny_distilled_patch16_224")
    student = make_student(teacher)
    student.train()
    student.set_distilled_training(True)
    images = torch.randn(2, 3, 48, 48)
    with tap_queries_keys(teacher) as teacher_taps, tap_queries_keys(student) as student_taps:
        with torch.no_grad():
            answer = teacher(images)
        logits = student(images)
        assert isinstance(logits, tuple)
        total, parts = DistillationLoss(0.5, 0.5, 1.0, 2.0, 1.0)(
            logits, torch.tensor([1, 6]), answer, student_taps.collect(), teacher_taps.collect()
        )
    assert set(parts) == {"label", "hard", "soft", "dgd"}
    total.backward()
    missing = [name for name, p in student.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not missing
