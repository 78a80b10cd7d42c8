"""What a run leaves in memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        model: trained, in evaluation mode, with the weights of the last epoch.
        output: folder with ``last.safetensors``, ``best.safetensors`` and ``metrics.jsonl``.
        top1, best_top1: accuracy of the last and of the best evaluated epoch, in percent of ``images``.
        best_epoch: epochs done when it was reached.
        images: for validation.
        epochs, steps: done.
        train_seconds: spent in steps, over all sessions of the run; evaluation is not counted, nor the steps of an epoch
            before the session that ended it.
        train_images_per_s: over all processes, in this session; 0 if it trained none.
        loader_idle: share of this session's training time spent waiting for images.
        peak_gb: GPU memory in 10^9 bytes, 0 on a CPU.
    """

    model: nn.Module
    output: Path
    top1: float
    best_top1: float
    best_epoch: int
    images: int
    epochs: int
    steps: int
    train_seconds: float
    train_images_per_s: float
    loader_idle: float
    peak_gb: float

    def behind(self, first: TrainingResult) -> TrainingResult:
        """The same of a run whose first stage ended as ``first``: epochs, steps and seconds of both."""
        return replace(
            self,
            best_epoch=first.epochs + self.best_epoch,
            epochs=first.epochs + self.epochs,
            steps=first.steps + self.steps,
            train_seconds=first.train_seconds + self.train_seconds,
            peak_gb=max(first.peak_gb, self.peak_gb),
        )
