"""What a step minimises: student and teacher run, and the loss gets what it reads of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from qvit.distill.features import FeatureTap
from qvit.distill.layout import Which, matched_blocks, token_layouts
from qvit.distill.taps import QueryKeyTaps, tap_queries_keys
from qvit.training.setup import Setup


class Objective:
    """The loss of student and teacher on a batch, and its terms.

    Args:
        setup: student, teacher, loss and projector.
        features: a stage of the run matches features, those of ``feature_blocks`` (`qvit.distill.layout.matched_blocks`).
        device: of the run.
        bf16: run student and teacher in bfloat16 autocast.

    Attributes:
        loss: of the stage that the run is in; reads no more than the setup's loss and features.
    """

    def __init__(self, setup: Setup, features: bool, feature_blocks: Which, device: torch.device, bf16: bool) -> None:
        self.loss, self._setup = setup.loss, setup
        self._needs_features, self._feature_blocks = features, feature_blocks
        self._device, self._bf16 = device, bf16
        self._taps: list[QueryKeyTaps] = []  # of student and teacher
        self._features: list[FeatureTap] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within it, q, k and features are kept as student and teacher run, where the loss reads them."""
        student, teacher = self._setup.model, self._setup.teacher
        with ExitStack() as stack:
            if self._setup.loss.needs_taps:
                assert teacher is not None
                self._taps = [stack.enter_context(tap_queries_keys(model)) for model in (student, teacher)]
            if self._needs_features:
                assert teacher is not None
                depths = len(token_layouts(student)), len(token_layouts(teacher))
                *pairs, _ = matched_blocks(*depths, self._feature_blocks)
                blocks = [own for own, _ in pairs], [other for _, other in pairs]
                models = zip((student, teacher), blocks, strict=True)
                self._features = [stack.enter_context(FeatureTap(model, chosen)) for model, chosen in models]
            yield

    def clear(self) -> None:
        """Forgets what was kept of a pass that the loss did not read: an evaluation, or one that failed."""
        kept: tuple[QueryKeyTaps | FeatureTap, ...] = (*self._taps, *self._features)
        for tap in kept:
            tap.clear()

    @torch.no_grad()
    def ask(self, teacher: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        """The teacher's logits [B, classes]."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            return teacher(images)

    def __call__(
        self, images: torch.Tensor, targets: torch.Tensor, answer: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, a scalar, and its terms; within `attached`.

        Args:
            images: [B, C, H, W].
            targets: labels [B], or probabilities [B, classes].
            answer: the teacher's logits [B, classes]; ``None`` to ask it.
        """
        student, teacher, projector = self._setup.model, self._setup.teacher, self._setup.projector
        if answer is None and teacher is not None:
            answer = self.ask(teacher, images)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            logits = student(images)
            student_taps, teacher_taps = [taps.collect() for taps in self._taps] or (None, None)
            student_features, teacher_features = [tap.collect() for tap in self._features] or (None, None)
            if projector is not None and student_features is not None:
                student_features, teacher_features = projector(student_features, teacher_features)
            return self.loss(logits, targets, answer, student_taps, teacher_taps, student_features, teacher_features)
