"""Oscillation regularisation: value and gradient against autograd in float64, the schedule, and a run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qvit.layers.weights import distance_to_threshold, quantized_weights
from qvit.training.engine import fit
from qvit.training.oscillation import OscillationPenalty, penalty_weight
from qvit.training.recipe import Recipe

from .test_engine import RANDOM, metrics


@pytest.mark.parametrize("kind", ["lsq", "statsq"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_value_and_gradient_are_those_of_the_formula(
    kind: str, bits: int, make_student: Callable[..., nn.Module], perturb: Callable[..., nn.Module]
) -> None:
    student = perturb(make_student(weight_bits=bits, weight_quantizer=kind))
    weights = [w for w in quantized_weights(student) if w.name.startswith("blocks")]
    wanted, total = {}, 0.0
    for w in weights:
        leaf = w.effective().detach().double().requires_grad_()
        quantized = w.quantized()
        d = leaf - quantized.value.double()
        penalty = d.norm()
        for code in quantized.codes.unique():
            penalty = penalty + d[quantized.codes == code].var(unbiased=False)
        (wanted[w.name],) = torch.autograd.grad(penalty, leaf)
        total += penalty.item()
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    got = OscillationPenalty(student).add_gradients(0.25)
    assert got.item() == pytest.approx(total, rel=1e-5)
    names = {f"{w.name}.weight" for w in weights}
    for name, p in student.named_parameters():
        if name in names:
            gradient = wanted[name.removesuffix(".weight")]
            torch.testing.assert_close(p.grad.double() - 1, 0.25 * gradient, rtol=1e-3, atol=1e-6)
        else:
            assert torch.equal(p.grad, torch.ones_like(p)), name


def test_weights_on_their_levels_have_no_penalty(make_student: Callable[..., nn.Module]) -> None:
    student = make_student(weight_bits=2)
    with torch.no_grad():
        for w in quantized_weights(student):
            if w.name.startswith("blocks"):
                w.parameter.copy_(w.quantized().value)
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    assert OscillationPenalty(student).add_gradients(1.0).item() == pytest.approx(0, abs=1e-5)
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_wide_weights_are_left_alone(make_student: Callable[..., nn.Module]) -> None:
    assert OscillationPenalty(make_student(weight_bits=5)).weights == []
    assert OscillationPenalty(make_student(weight_bits=5)).add_gradients(1.0).item() == 0


def test_the_weight_rises_by_half_a_cosine() -> None:
    values = [penalty_weight(step, 100, 0.01, 0.25) for step in range(101)]
    assert values[:26] == [0.0] * 26
    assert all(a < b for a, b in itertools.pairwise(values[25:]))
    assert values[62] < 0.005 < values[63]
    assert values[100] == pytest.approx(0.01)
    assert penalty_weight(0, 10, 0.5, 0) == 0.0
    assert penalty_weight(5, 10, 0.5, 0) == pytest.approx(0.25)


def test_a_run_ends_with_weights_further_from_their_thresholds(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    def undecided(weight: float) -> float:
        changes: dict[str, Any] = {"quant": {"bits": 2}, "oscillation": {"weight": weight}, "schedule": {"epochs": 6}}
        result = fit(tiny_recipe(**RANDOM | changes), tmp_path / str(weight), progress=False)
        pairs = [(w.effective(), w.quantized()) for w in quantized_weights(result.model) if w.bits == 2]
        return torch.cat([(distance_to_threshold(*pair) < 0.1).float().flatten() for pair in pairs]).mean().item()

    assert undecided(1.0) < 0.7 * undecided(0.0)
    terms = [line["oscillation"] for line in metrics(tmp_path / "1.0", "train")]
    assert terms[:8] == [0.0] * 8
    assert 0 < terms[9] < terms[20]
    assert "oscillation" not in metrics(tmp_path / "0.0", "train")[-1]
