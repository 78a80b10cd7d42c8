"""Confidence-guided annealing: what may move, what may not, and a run that ends in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qvit.training.loop
from qvit.layers.weights import distance_to_threshold, quantized_weights
from qvit.training.annealing import Annealing
from qvit.training.checkpoint import LAST, read_checkpoint
from qvit.training.engine import fit
from qvit.training.interrupt import TrainingInterrupted
from qvit.training.recipe import Recipe

from .test_engine import RANDOM, metrics, same_tensors


@pytest.mark.parametrize("kind", ["lsq", "statsq"])
@pytest.mark.parametrize("width", [0.005, 0.1, 0.5])
def test_only_undecided_weights_move(
    kind: str, width: float, make_student: Callable[..., nn.Module], perturb: Callable[..., nn.Module]
) -> None:
    student = perturb(make_student(weight_bits=2, weight_quantizer=kind))
    weights = quantized_weights(student)
    near = [distance_to_threshold(w.effective(), w.quantized()) <= width for w in weights]
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    # Momentum and weight decay move weights without a gradient as well.
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, weight_decay=0.1)
    for p in student.parameters():
        p.grad = torch.randn_like(p)
    with Annealing(student, width).holding():
        optimizer.step()
    held = set()
    for weight, free in zip(weights, near, strict=True):
        held.add(f"{weight.name}.weight")
        if weight.scale is not None:
            held.add(f"{weight.name}.weight_quantizer.scale")
            assert torch.equal(weight.scale, before[f"{weight.name}.weight_quantizer.scale"])
        moved = (weight.parameter != before[f"{weight.name}.weight"]).view_as(free)
        assert torch.equal(moved, free)
        if width == 0.1:
            assert free.any()
            assert not free.all()
    assert all(not torch.equal(p, before[name]) for name, p in student.named_parameters() if name not in held)


def recipe_of(tiny_recipe: Callable[..., Recipe], **changes: Any) -> Recipe:
    return tiny_recipe(**RANDOM | {"quant": {"bits": 2}, "anneal": {"share": 0.4, "width": 0.02}} | changes)


@pytest.mark.parametrize("kind", ["lsq", "statsq"])
def test_the_end_of_a_run_is_annealed(
    kind: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 15 steps the last 6: from then on settled weights stay, and before that they move."""
    taken: list[dict[str, torch.Tensor]] = []
    original = qvit.training.loop.TrainingLoop._train_step

    def watching(self: Any, *args: Any) -> None:
        taken.append({w.name: w.parameter.detach().clone() for w in quantized_weights(self.model)})
        original(self, *args)

    monkeypatch.setattr(qvit.training.loop.TrainingLoop, "_train_step", watching)
    recipe = recipe_of(tiny_recipe, quant={"bits": 2, "weight_quantizer": kind})
    result = fit(recipe, tmp_path, progress=False)
    taken.append({w.name: w.parameter.detach().clone() for w in quantized_weights(result.model)})
    share = [
        sum(int((a[name] != b[name]).sum()) for name in a) / sum(t.numel() for t in a.values())
        for a, b in itertools.pairwise(taken)
    ]
    assert len(share) == 15
    assert min(share[:9]) > 0.5
    assert max(share[9:]) < 0.2
    assert max(share[9:]) > 0
    assert {line["lr"] for line in metrics(tmp_path, "train")[9:]} == {2e-5}


def test_it_resumes_exactly_in_the_middle(
    tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_recipe)
    original = qvit.training.loop.learning_rate

    def interrupting(step: int, *args: Any) -> float:
        if step == 11:
            import signal

            signal.raise_signal(signal.SIGINT)
        return original(step, *args)

    monkeypatch.setattr(qvit.training.loop, "learning_rate", interrupting)
    with pytest.raises(TrainingInterrupted):
        fit(recipe, tmp_path / "a", progress=False)
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "a" / LAST).metadata.step == 12
    fit(recipe, tmp_path / "a", resume=True, progress=False)
    fit(recipe, tmp_path / "b", progress=False)
    assert same_tensors(tmp_path / "a" / LAST, tmp_path / "b" / LAST)
