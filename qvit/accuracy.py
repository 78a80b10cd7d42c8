"""Top-1 accuracy, counted without PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from qvit.errors import InputError


@dataclass(frozen=True)
class Evaluation:
    """How often a model was right.

    Attributes:
        correct: images whose most likely class is theirs.
        images: images in all.
    """

    correct: int
    images: int

    @property
    def top1(self) -> float:
        """Accuracy in percent."""
        return 100 * self.correct / self.images


def top1_of_arrays(predict: Callable[[np.ndarray], np.ndarray], batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Evaluation:
    """Counts how many images are classified rightly.

    Args:
        predict: images, as ``batches`` has them, -> logits [B, classes]; a `qvit.engines.Runner`, for one.
        batches: (images [B, C, H, W], class indices [B]), such as `qvit.batches.PixelBatches`.

    Raises:
        InputError: there are no images.
    """
    correct = images = 0
    for batch, labels in batches:
        correct += int((predict(batch).argmax(axis=-1) == labels).sum())
        images += len(labels)
    if not images:
        raise InputError("There are no images to evaluate.")
    return Evaluation(correct, images)
