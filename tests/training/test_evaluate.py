"""Accuracy: every image counts once, whatever the batches."""

from __future__ import annotations

import pytest
import torch

from qvit.accuracy import Evaluation
from qvit.errors import InputError
from qvit.training.evaluate import count_correct, evaluate


def test_right_answers_are_counted() -> None:
    labels = torch.tensor([0, 1, 2, 1, 0, 2, 2])
    answers = torch.tensor([0, 1, 2, 0, 0, 1, 2])  # five of seven
    logits = torch.nn.functional.one_hot(answers, 3).float()
    batches = [(logits[i : i + 3], labels[i : i + 3]) for i in range(0, 7, 3)]
    result = evaluate(lambda x: x, batches)
    assert result == Evaluation(5, 7)
    assert result.top1 == pytest.approx(500 / 7)


def test_nothing_to_evaluate() -> None:
    with pytest.raises(InputError, match="no images"):
        evaluate(lambda x: x, [])
    assert count_correct(lambda x: x, []) == Evaluation(0, 0)


def test_no_gradients_are_kept() -> None:
    weight = torch.ones(2, 2, requires_grad=True)
    seen = []

    def predict(x: torch.Tensor) -> torch.Tensor:
        out = x @ weight
        seen.append(out.requires_grad)
        return out

    evaluate(predict, [(torch.eye(2), torch.tensor([0, 1]))])
    assert seen == [False]
