"""A student that starts from another one: what it takes over, what it calibrates anew, and what does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qvit.training.setup
from qvit.errors import BudgetError, RecipeError, TrainingError, WeightsError
from qvit.spec import ModelSpec
from qvit.training.cascade import FIRST_STAGE, cascade_stages, read_stages
from qvit.training.checkpoint import LAST, load_student
from qvit.training.engine import fit
from qvit.training.interrupt import TrainingInterrupted
from qvit.training.provenance import provenance_of
from qvit.training.recipe import Recipe

from .helpers import interrupt_at_step
from .test_engine import RANDOM, metrics, same_tensors

MakeRecipe = Callable[..., Recipe]
ARGS = RANDOM["model"]["args"]


@pytest.fixture
def start(tiny_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """A student at 4 bits."""
    recipe = tiny_recipe(quant={"bits": 4}, schedule={"epochs": 6}, optim={"lr": 5e-3})
    fit(recipe, tmp_path / "start", progress=False)
    return tmp_path / "start" / LAST


@pytest.mark.parametrize("kind", ["lsq", "statsq"])
def test_weights_and_irm_are_taken_over_and_scales_are_new(
    kind: str, start: Path, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Any] = []
    original = qvit.training.setup.calibrate

    def watching(model: Any, *args: Any, **kwargs: Any) -> None:
        original(model, *args, **kwargs)
        begun.append({name: value.cpu().clone() for name, value in model.state_dict().items()})

    monkeypatch.setattr(qvit.training.setup, "calibrate", watching)
    changes: dict[str, Any] = {"quant": {"bits": 2, "weight_quantizer": kind, "start_from": str(start)}}
    result = fit(tiny_recipe(**changes), tmp_path / "low", progress=False)
    theirs, low = load_student(start)[0].state_dict(), begun[0]
    for name, value in low.items():
        if "_quantizer." not in name:
            assert torch.equal(value, theirs[name]), name
    assert low["blocks.0.attn.rectify_q.weight"].std() > 0
    scale = "blocks.0.mlp.fc1.input_quantizer.scale"
    assert low[scale] > 1.5 * theirs[scale], "the scale is still that of 4 bits"
    assert result.model.qvit.spec.weight_bits == 2
    # What comes from a trained student starts with less to learn than what comes from the float model, which was not trained.
    fit(tiny_recipe(quant={"bits": 2, "weight_quantizer": kind}), tmp_path / "plain", progress=False)
    first, plain = metrics(tmp_path / "low", "train")[0], metrics(tmp_path / "plain", "train")[0]
    assert first["label"] < 0.9 * plain["label"]


def test_it_resumes_without_the_start(start: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"quant": {"bits": 2, "start_from": str(start)}}
    fit(tiny_recipe(**changes), tmp_path / "b", progress=False)
    fit(tiny_recipe(**changes), tmp_path / "a", progress=False)
    assert same_tensors(tmp_path / "a" / LAST, tmp_path / "b" / LAST)
    start.rename(tmp_path / "elsewhere.safetensors")
    fit(tiny_recipe(**changes), tmp_path / "a", resume=True, progress=False)
    _, metadata = load_student(tmp_path / "a" / LAST)
    assert provenance_of(metadata)["recipe"]["quant"]["start_from"] == LAST


def test_what_does_not_fit_is_refused(start: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    def refused(words: str, error: type[Exception] = RecipeError, **changes: Any) -> None:
        recipe = tiny_recipe(**{"quant": {"bits": 2, "start_from": str(start)}} | changes)
        with pytest.raises(error, match=words) as caught:
            fit(recipe, tmp_path / "run", progress=False)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    refused("another architecture", model={"args": ARGS | {"depth": 3}})
    refused("has IRM and this student lacks it", method="baseline")
    refused("another preprocessing", data={"mean": [0.1, 0.2, 0.3]})
    refused("There is no checkpoint", WeightsError, quant={"start_from": str(tmp_path / "none.safetensors")})
    fit(tiny_recipe(method="float", schedule={"epochs": 1}), tmp_path / "float", progress=False)
    refused("holds a float model", WeightsError, quant={"start_from": str(tmp_path / "float" / LAST)})


CASCADE: dict[str, Any] = {"quant": {"bits": 2}, "schedule": {"epochs": 3, "warmup_epochs": 1.5}, "cascade": {"share": 0.4}}


def test_the_stages_share_the_epochs(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(**CASCADE | {"anneal": {"share": 0.1}, "oscillation": {"weight": 0.01}})
    recipe = recipe.override("schedule.epochs=8", "activations_first.epochs=1", "quant.act_bits=3")
    first, second = cascade_stages(recipe, tmp_path)
    assert (first.schedule.epochs, second.schedule.epochs) == (3, 5)
    assert (first.schedule.warmup_epochs, second.schedule.warmup_epochs) == (1.5, 1.5)
    assert (first.model_spec().weight_bits, first.model_spec().act_bits) == (4, 4)
    assert (second.model_spec().weight_bits, second.model_spec().act_bits) == (2, 3)
    assert (first.activations_first.epochs, second.activations_first.epochs) == (1, 0)
    assert (first.anneal.share, second.anneal.share) == (0, 0.1)
    assert (first.oscillation.weight, second.oscillation.weight) == (0, 0.01)
    assert second.quant.start_from == tmp_path / FIRST_STAGE / LAST
    assert not first.cascades
    assert not second.cascades
    # A path that YAML could not hold as json writes it.
    assert cascade_stages(recipe, Path("\U0001f600\x7f"))[1].quant.start_from == Path("\U0001f600\x7f") / FIRST_STAGE / LAST
    few = cascade_stages(recipe.override("cascade.share=0.01", "schedule.epochs=2", "activations_first.epochs=0"), tmp_path)
    assert [stage.schedule.epochs for stage in few] == [1, 1]


def test_where_a_recipe_cascades(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(**CASCADE)
    assert recipe.cascades
    assert recipe.override("quant.bits=4", "quant.act_bits=3").cascades
    assert recipe.override("quant.bits=4", "quant.budget_mb=1").cascades
    others = ("cascade.share=0", "quant.bits=4", "cascade.bits=2", "method=float", "quant.start_from=other.safetensors")
    for other in others:
        assert not recipe.override(other).cascades, other
    with pytest.raises(RecipeError, match=r"schedule.epochs is 1, and a cascade has two stages"):
        recipe.override("schedule.epochs=1", "schedule.warmup_epochs=0")
    with pytest.raises(RecipeError, match=r"activations_first.epochs is 1, .* no epoch of the 1 in the cascade's first stage"):
        recipe.override("activations_first.epochs=1")
    assert recipe.override("activations_first.epochs=1", "cascade.share=0.7").cascades


def test_a_cascade_is_both_runs_in_one(tiny_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(**CASCADE)
    result = fit(recipe, tmp_path / "run")
    assert "first stage: 4 bits, 1 of 3 epochs" in capsys.readouterr().err
    by_hand = tmp_path / "by_hand"
    one = {"warmup_epochs": 1}
    first = fit(tiny_recipe(quant={"bits": 4}, schedule={"epochs": 1} | one), by_hand / "4", progress=False)
    start = {"bits": 2, "start_from": str(by_hand / "4" / LAST)}
    second = fit(tiny_recipe(quant=start, schedule=CASCADE["schedule"] | {"epochs": 2}), by_hand / "2", progress=False)
    assert same_tensors(tmp_path / "run" / FIRST_STAGE / LAST, by_hand / "4" / LAST)
    assert same_tensors(tmp_path / "run" / LAST, by_hand / "2" / LAST)
    assert (result.epochs, result.steps) == (3, first.steps + second.steps)
    assert result.best_epoch == 1 + second.best_epoch
    assert result.output == tmp_path / "run"
    metadata = load_student(tmp_path / "run" / LAST)[1]
    assert result.train_seconds == metadata.metrics["first_stage_seconds"] + metadata.metrics["train_seconds"]
    assert (metadata.epochs, provenance_of(metadata)["epochs"]) == (2, 3)
    assert provenance_of(load_student(tmp_path / "run" / FIRST_STAGE / LAST)[1])["epochs"] == 1


def test_a_cascade_that_is_done_needs_its_first_stage_no_more(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, run = tiny_recipe(**CASCADE), tmp_path / "run"
    result = fit(recipe, run, progress=False)
    with pytest.raises(TrainingError, match=r"run holds a run already"):
        fit(recipe, run, progress=False)
    shutil.rmtree(run / FIRST_STAGE)
    again = fit(recipe, run, resume=True, progress=False)
    assert not (run / FIRST_STAGE).exists()
    numbers = ("epochs", "steps", "train_seconds", "best_epoch", "top1")
    assert [getattr(again, name) for name in numbers] == [getattr(result, name) for name in numbers]
    # A recipe that does not fit is refused before a first stage is trained for it.
    with pytest.raises(TrainingError, match=r"started with cascade.bits=4, now it is 3"):
        fit(recipe.override("cascade.bits=3"), run, resume=True, progress=False)
    assert not (run / FIRST_STAGE).exists()


def test_a_budget_is_chosen_before_the_first_stage(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(**CASCADE).override("quant.budget_bops=2.5e6")
    result = fit(recipe, tmp_path / "run", progress=False)
    spec = result.model.qvit.spec
    assert spec.overrides
    assert load_student(tmp_path / "run" / FIRST_STAGE / LAST)[1].student.spec == ModelSpec.of_bits(4)
    # The same run by hand, which chooses when its student is made.
    start = json.dumps(str(tmp_path / "run" / FIRST_STAGE / LAST))
    second = recipe.override(f"quant.start_from={start}", "schedule.epochs=2")
    assert fit(second, tmp_path / "by_hand", progress=False).model.qvit.spec == spec
    assert same_tensors(tmp_path / "run" / LAST, tmp_path / "by_hand" / LAST)
    assert fit(recipe, tmp_path / "run", resume=True, progress=False).model.qvit.spec == spec
    with pytest.raises(BudgetError, match="cannot be met"):
        fit(recipe.override("quant.budget_bops=1000"), tmp_path / "refused", progress=False)
    assert not (tmp_path / "refused").exists()


def test_the_log_of_both_stages_is_one(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    fit(tiny_recipe(**CASCADE), tmp_path, progress=False)
    _, metadata = load_student(tmp_path / LAST)
    log = [line for line in read_stages(tmp_path, metadata.metrics) if line["kind"] == "train"]
    assert [line["step"] for line in log] == list(range(1, 16))
    assert [line.get("first_stage", False) for line in log] == [True] * 5 + [False] * 10
    evaluations = [line for line in read_stages(tmp_path, metadata.metrics) if line["kind"] == "eval"]
    assert [(line["step"], line["epoch"]) for line in evaluations] == [(5, 1), (10, 2), (15, 3)]
    # A folder of that name is not of this run where its metrics do not know of it.
    assert [line["step"] for line in read_stages(tmp_path, {}) if line["kind"] == "train"] == list(range(1, 11))


@pytest.mark.parametrize("step", [3, 8])
def test_a_cascade_goes_on_where_it_was_stopped(
    step: int, tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(**CASCADE)
    whole = fit(recipe, tmp_path / "whole", progress=False)
    assert whole.steps == 15  # five of them in the first stage
    where = "first stage of the cascade" if step == 3 else f"after step {step - 5} of"
    with monkeypatch.context() as patch:
        interrupt_at_step(patch, step)
        with pytest.raises(TrainingInterrupted, match=rf"{where}.*resume the run in {tmp_path / 'run'} to go on"):
            fit(recipe, tmp_path / "run", progress=False)
    with pytest.raises(TrainingError, match=r"run holds a run already"):
        fit(recipe, tmp_path / "run", progress=False)
    fit(recipe, tmp_path / "run", resume=True, progress=False)
    assert same_tensors(tmp_path / "run" / LAST, tmp_path / "whole" / LAST)


def test_a_cascade_that_has_no_first_stage_says_so(
    tiny_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for share in (0.5, 0.0):
        cascade = {"share": share, "bits": 2}
        recipe = tiny_recipe(quant={"bits": 4}, schedule={"epochs": 1, "warmup_epochs": 0}, cascade=cascade)
        fit(recipe, tmp_path / str(share))
        said = "no first stage, since the student has no fewer bits than cascade.bits=2" in capsys.readouterr().err
        assert said is (share > 0)


def test_a_quantized_model_cannot_cascade(start: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"set cascade.share to 0"):
        fit(tiny_recipe(**CASCADE), tmp_path / "run", model=load_student(start)[0], progress=False)
    assert not (tmp_path / "run").exists()
