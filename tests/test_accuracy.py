"""Top-1 accuracy without PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qvit.accuracy import Evaluation, top1_of_arrays
from qvit.errors import InputError
from qvit.training.evaluate import evaluate


def test_percentage() -> None:
    assert Evaluation(3, 8).top1 == 37.5


def test_counts_over_uneven_batches_as_pytorch_does() -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((23, 5)).astype(np.float32), rng.integers(0, 5, 23)
    batches = [(images[i : i + 7], labels[i : i + 7]) for i in range(0, 23, 7)]
    result = top1_of_arrays(lambda x: 2 * x, batches)
    assert (result.correct, result.images) == (int((images.argmax(-1) == labels).sum()), 23)
    assert result == evaluate(lambda x: 2 * x, [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches])


def test_no_images() -> None:
    with pytest.raises(InputError, match="no images"):
        top1_of_arrays(lambda x: x, [])
