"""The training loss: labels, the teacher's answer (hard or soft), DGD and feature matching, each with a weight.

The four recipes of the paper's ablation: labels and hard answer at one half each (the baseline, and with IRM in the model
"+IRM"), the same with ``dgd=1`` ("+DGD", and with IRM the full Q-ViT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch.nn import functional as F

from qvit.distill.features import Features, feature_loss
from qvit.distill.similarity import Taps, dgd_loss
from qvit.errors import RecipeError, TrainingError

Logits = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class DistillationLoss:
    """``label * CE(student, targets) + hard * CE(student, argmax teacher) + soft * T^2 KL(teacher || student) + ..``.

    A term of weight 0 is not computed.

    Attributes:
        label: weight of the cross-entropy with the labels.
        hard: weight of the cross-entropy with the teacher's arg-max label (equation 2.17, with both weights one half).
        soft: weight of the Kullback-Leibler divergence at temperature T, times T^2 (Hinton et al. 2015).
        temperature: T.
        dgd: weight of the similarity distances of q and k (equation 2.23; the paper's is 1).
        feature: weight of the distance of the features that are given (`qvit.distill.features`).

    Raises:
        RecipeError: a weight is negative or all are zero, or the temperature is not positive.
    """

    label: float = 0.5
    hard: float = 0.5
    soft: float = 0.0
    temperature: float = 1.0
    dgd: float = 0.0
    feature: float = 0.0

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise RecipeError(f"The loss's {name} is {value!r}: give a number.")
            if value < 0 and name != "temperature":
                raise RecipeError(f"The loss's weight {name}={value} is negative: use 0 to leave the term out.")
        if self.temperature <= 0:
            raise RecipeError(f"The loss's temperature={self.temperature} must be above 0.")
        if not (self.label or self.hard or self.soft or self.dgd or self.feature):
            raise RecipeError("Every weight of the loss is 0: set at least one of label, hard, soft, dgd and feature.")

    @property
    def needs_teacher(self) -> bool:
        """Whether a term reads the teacher at all."""
        return bool(self.hard or self.soft or self.dgd or self.feature)

    @property
    def needs_taps(self) -> bool:
        """Whether q and k of student and teacher are read."""
        return bool(self.dgd)

    def __call__(
        self,
        student_logits: Logits,
        targets: torch.Tensor | None,
        teacher_logits: torch.Tensor | None = None,
        student_taps: Taps | None = None,
        teacher_taps: Taps | None = None,
        student_features: Features | None = None,
        teacher_features: Features | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss and its terms.

        Args:
            student_logits: [B, classes], or (class head, distillation head) as timm's distilled DeiT gives them in distilled
                training: then ``label`` reads the first, ``hard`` and ``soft`` the second.
            targets: labels [B], int64, or probabilities [B, classes] (mixup, label smoothing).
            teacher_logits: [B, classes].
            student_taps, teacher_taps: what `QueryKeyTaps.collect` gives.
            student_features, teacher_features: what `FeatureTap.collect` gives.

        Returns:
            The weighted sum (a scalar, float32) and the terms, unweighted and detached, by name.

        Raises:
            TrainingError: a term lacks what it reads, or teacher and student differ in classes.
        """
        class_logits, distill_logits = student_logits if isinstance(student_logits, tuple) else (student_logits, student_logits)
        terms: dict[str, torch.Tensor] = {}
        if self.label:
            if targets is None:
                raise TrainingError("The label term of the loss has no labels: give targets, or set its weight to 0.")
            terms["label"] = F.cross_entropy(class_logits.float(), targets)
        if self.hard or self.soft:
            answer = _teacher_answer(teacher_logits, distill_logits)
            if self.hard:
                terms["hard"] = F.cross_entropy(distill_logits.float(), answer.argmax(dim=-1))
            if self.soft:
                student = F.log_softmax(distill_logits.float() / self.temperature, dim=-1)
                teacher = F.log_softmax(answer / self.temperature, dim=-1)
                divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
                terms["soft"] = divergence * self.temperature**2
        if self.dgd:
            if student_taps is None or teacher_taps is None:
                raise TrainingError(
                    "The dgd term of the loss needs q and k of student and teacher: tap both, or set its weight to 0."
                )
            terms["dgd"] = dgd_loss(student_taps, [(q.detach(), k.detach()) for q, k in teacher_taps])
        if self.feature:
            if student_features is None or teacher_features is None:
                raise TrainingError(
                    "The feature term of the loss needs features of student and teacher: tap both, or set its weight to 0."
                )
            terms["feature"] = feature_loss(student_features, teacher_features)
        total = torch.stack([getattr(self, name) * term for name, term in terms.items()]).sum()
        return total, {name: term.detach() for name, term in terms.items()}


def _teacher_answer(teacher_logits: torch.Tensor | None, student_logits: torch.Tensor) -> torch.Tensor:
    """The teacher's logits [B, classes] in float32, without gradient."""
    if teacher_logits is None:
        raise TrainingError("The hard and soft terms of the loss need a teacher: give its logits, or set their weights to 0.")
    if teacher_logits.shape != student_logits.shape:
        raise TrainingError(
            f"The teacher gives {tuple(teacher_logits.shape)} logits and the student {tuple(student_logits.shape)}: "
            "use a teacher of the same classes."
        )
    return teacher_logits.detach().float()
