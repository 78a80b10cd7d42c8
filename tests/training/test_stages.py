"""Activations first: weights stay float, then join with scales of their own; a run resumes on either side of the switch."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import qvit.training.loop
from qvit.calibration.calibrate import calibrate_weights
from qvit.errors import RecipeError
from qvit.layers.weights import quantized_weights
from qvit.training.checkpoint import BEST, LAST, read_checkpoint
from qvit.training.engine import fit
from qvit.training.interrupt import TrainingInterrupted
from qvit.training.recipe import Recipe

from .test_engine import RANDOM, metrics, same_tensors

FIRST: dict[str, Any] = RANDOM | {"quant": {"bits": 2}, "activations_first": {"epochs": 1, "feature": 0.5}}


def test_with_weights_in_float_the_layers_are_those_of_infinitely_many_weight_bits(make_student: Callable[..., Any]) -> None:
    student = make_student(weight_bits=2, act_bits=4)
    fc1, patch = student.blocks[0].mlp.fc1, student.patch_embed.proj
    x, images = torch.randn(2, 10, 48), torch.randn(2, 3, 48, 48)
    low = fc1(x)
    for weight in quantized_weights(student):
        weight.layer.weight_quantizer.enabled = False
    want = fc1.input_quantizer(x).value @ fc1.weight.t() + fc1.bias
    torch.testing.assert_close(fc1(x), want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fc1(x), low, atol=1e-2)
    # Pixels lose nothing, so the patch embedding is the float convolution on what pixels can be.
    pixels = torch.randint(0, 256, images.shape) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (student.qvit.preprocessing.mean, student.qvit.preprocessing.std))
    normalised = (pixels - mean) / std
    want = nn.functional.conv2d(normalised, patch.weight, patch.bias, stride=16)
    torch.testing.assert_close(patch(normalised), want, rtol=1e-4, atol=1e-4)
    student(images).sum().backward()
    assert fc1.weight.grad is not None
    assert fc1.weight_quantizer.scale.grad is None


def test_calibrating_weights_anew_touches_nothing_else(make_student: Callable[..., Any]) -> None:
    student = make_student(weight_bits=2)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        for weight in quantized_weights(student):
            weight.scale.mul_(7)
    calibrate_weights(student)
    errors = []
    for weight in quantized_weights(student):
        error = (weight.quantized().value - weight.effective()).square().mean()
        errors.append((error / weight.effective().square().mean()).item())
    assert max(errors) < 0.25
    after = student.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if not k.endswith("weight_quantizer.scale"))


def test_the_two_stages_of_a_run(tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, torch.Tensor, torch.Tensor]] = []
    original = qvit.training.loop.TrainingLoop._train_step

    def watching(self: Any, *args: Any) -> None:
        fc1 = self.model.blocks[0].mlp.fc1
        quantizer = fc1.weight_quantizer
        seen.append((quantizer.enabled, quantizer.scale.detach().clone(), fc1.weight.detach().clone()))
        original(self, *args)

    monkeypatch.setattr(qvit.training.loop.TrainingLoop, "_train_step", watching)
    result = fit(tiny_recipe(**FIRST), tmp_path, progress=False)
    assert [enabled for enabled, *_ in seen] == [False] * 5 + [True] * 10
    scales = [scale for _, scale, _ in seen]
    assert all(torch.equal(scale, scales[0]) for scale in scales[:5])
    assert not torch.equal(scales[4], scales[5]), "the scales were not calibrated at the switch"
    assert not torch.equal(scales[5], scales[6])
    weights = [weight for *_, weight in seen]
    assert not torch.equal(weights[3], weights[4])
    train = metrics(tmp_path, "train")
    assert all("feature" in line for line in train[:5])
    assert not any("feature" in line for line in train[5:])
    line = train[0]
    assert line["loss"] == pytest.approx(0.5 * (line["label"] + line["hard"] + line["feature"]) + line["dgd"], rel=1e-5)
    assert [line["epoch"] for line in metrics(tmp_path, "eval_activations")] == [1]
    assert [line["epoch"] for line in metrics(tmp_path, "eval")] == [2, 3]
    assert result.best_epoch in (2, 3)
    assert read_checkpoint(tmp_path / BEST).metadata.epochs == result.best_epoch
    assert result.top1 == metrics(tmp_path, "eval")[-1]["top1"]


@pytest.mark.parametrize("kind", ["lsq", "statsq"])
@pytest.mark.parametrize("stop", [3, 4, 5, 12])
def test_it_resumes_on_either_side_of_the_switch_and_at_it(
    kind: str, stop: int, tiny_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(**FIRST | {"quant": {"bits": 2, "weight_quantizer": kind}, "activations_first": {"epochs": 1}})
    original = qvit.training.loop.learning_rate

    def interrupting(step: int, *args: Any) -> float:
        if step == stop:
            signal.raise_signal(signal.SIGINT)
        return original(step, *args)

    monkeypatch.setattr(qvit.training.loop, "learning_rate", interrupting)
    with pytest.raises(TrainingInterrupted):
        fit(recipe, tmp_path / "a", progress=False)
    monkeypatch.undo()
    stopped = read_checkpoint(tmp_path / "a" / LAST).metadata
    assert stopped.step == stop + 1
    fit(recipe, tmp_path / "a", resume=True, progress=False)
    fit(recipe, tmp_path / "b", progress=False)
    assert same_tensors(tmp_path / "a" / LAST, tmp_path / "b" / LAST)
    assert metrics(tmp_path / "a", "eval") == metrics(tmp_path / "b", "eval")


@pytest.mark.parametrize("blocks", ["last", "all"])
def test_features_may_be_matched_throughout(blocks: str, tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    weights = {"label": 0, "hard": 0, "dgd": 0, "feature": 2.0, "feature_blocks": blocks}
    recipe = tiny_recipe(distill=weights, schedule={"epochs": 4})
    fit(recipe, tmp_path, progress=False)
    lines = metrics(tmp_path, "train")
    assert all(line["loss"] == pytest.approx(2 * line["feature"], rel=1e-5) for line in lines)
    assert sum(line["feature"] for line in lines[-5:]) < 0.8 * sum(line["feature"] for line in lines[:5])


@pytest.mark.parametrize(("first", "share"), [(3, 0.0), (4, 0.0), (2, 0.5)])
def test_a_stage_that_leaves_no_epoch_for_the_weights_is_refused(first: int, share: float) -> None:
    values = {"schedule": {"epochs": 3}, "activations_first": {"epochs": first}, "anneal": {"share": share}}
    with pytest.raises(RecipeError, match=f"activations_first.epochs is {first}, which leaves no epoch of 3"):
        Recipe.from_dict(values)


def test_a_float_run_has_one_stage(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny_recipe(method="float", activations_first={"epochs": 1}, anneal={"share": 0.2}, oscillation={"weight": 1})
    fit(recipe, tmp_path, progress=False)
    assert [line["epoch"] for line in metrics(tmp_path, "eval")] == [1, 2, 3]
    assert set(metrics(tmp_path, "train")[0]) == {"kind", "step", "epoch", "loss", "label", "lr"}


def test_a_teacher_of_another_width_is_refused_before_training(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    teacher = timm.create_model(RANDOM["model"]["name"], **RANDOM["model"]["args"] | {"embed_dim": 48})
    with pytest.raises(RecipeError, match=r"teacher's features are .*48.* wide"):
        fit(tiny_recipe(activations_first={"epochs": 1}, distill={"dgd": 0}), tmp_path / "run", teacher=teacher, progress=False)
    assert not (tmp_path / "run").exists()
