"""Top-1 accuracy of anything that turns images into logits: a float model, a student, an integer engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from qvit.accuracy import Evaluation
from qvit.errors import InputError
from qvit.training.data import batches_of


def evaluate(
    predict: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Counts how many images are classified rightly.

    Args:
        predict: images [B, C, H, W], float32, normalised -> logits [B, classes]. A module must be in evaluation mode.
        batches: (images, class indices [B]), as `qvit.training.data.evaluation_loader` gives them.
        device: where ``predict`` takes its images.

    Raises:
        InputError: there are no images.
    """
    result = count_correct(predict, batches, device)
    if not result.images:
        raise InputError("There are no images to evaluate.")
    return result


@torch.no_grad()
def count_correct(
    predict: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device | str = "cpu",
) -> Evaluation:
    """`evaluate` for a share of the images, which may be empty."""
    correct = torch.zeros((), dtype=torch.int64, device=device)
    images = 0
    for batch, labels in batches_of(batches):
        logits = predict(batch.to(device, non_blocking=True))
        # Summed on the device: a GPU is not waited for before the end.
        correct += (logits.argmax(dim=-1).to(device) == labels.to(device, non_blocking=True)).sum()
        images += len(labels)
    return Evaluation(int(correct), images)
