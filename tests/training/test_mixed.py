"""Budgets in recipes: the frozen file keeps them, runs resume with their widths, other processes are told of them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qvit
import qvit.training.setup
from qvit.analyze.cost import model_cost
from qvit.analyze.unit_sensitivity import Sensitivities
from qvit.errors import BudgetError, InputError, RecipeError, TrainingError
from qvit.integer.freeze import freeze
from qvit.spec import ModelSpec
from qvit.training.checkpoint import LAST, load_student, read_checkpoint
from qvit.training.engine import fit
from qvit.training.mixed import spec_within_budget
from qvit.training.provenance import provenance_of
from qvit.training.recipe import Recipe

from .helpers import tiny_values

MakeRecipe = Callable[..., Recipe]
BUDGET_MB, BUDGET_BOPS = 0.0245, 2.0e6


@pytest.fixture(scope="module")
def trained(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Path]:
    """A recipe with both budgets, the folder of its run, and the file of its sensitivities."""
    folder = tmp_path_factory.mktemp("mixed")
    file = folder / "sensitivities.json"
    quant = {"budget_mb": BUDGET_MB, "budget_bops": BUDGET_BOPS, "sensitivities": str(file)}
    torch.set_num_threads(1)
    recipe = Recipe.from_dict(tiny_values(image_folder, quant=quant, schedule={"epochs": 1}))
    fit(recipe, folder / "run", progress=False)
    return recipe, folder / "run", file


def test_the_frozen_file_keeps_the_budget(trained: tuple[Recipe, Path, Path], tmp_path: Path) -> None:
    student, metadata = load_student(trained[1] / LAST)
    model = freeze(student, metadata.classes, provenance_of(metadata))
    path = tmp_path / "mixed.qvit"
    # The budget is used up, but for what is kept free for accuracies and for the next step of a width.
    assert BUDGET_MB * 1e6 - 2500 <= model.save(path) <= BUDGET_MB * 1e6
    cost = model_cost(model.architecture, model.specs)
    assert 0.8 * BUDGET_BOPS < cost.bit_operations <= BUDGET_BOPS
    assert len({spec.bits for name, spec in model.specs.items() if name.startswith("blocks.")}) > 1
    assert qvit.IntegerModel.load(path).specs == model.specs
    # Folders are not told.
    assert model.provenance["recipe"]["quant"]["sensitivities"] == "sensitivities.json"


def test_the_measurements_are_used_again(
    trained: tuple[Recipe, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run, file = trained
    measured = Sensitivities.load(file)
    assert measured.images == 16
    monkeypatch.setattr("qvit.analyze.budget.measure_sensitivities", None)
    fit(recipe, tmp_path / "run", progress=False)
    student = read_checkpoint(tmp_path / "run" / LAST).metadata.student
    assert student == read_checkpoint(run / LAST).metadata.student


def test_a_run_resumes_with_its_widths(trained: tuple[Recipe, Path, Path], tmp_path: Path, image_folder: Path) -> None:
    recipe, run, _ = trained
    target = tmp_path / "run"
    target.mkdir()
    (target / LAST).write_bytes((run / LAST).read_bytes())
    # Neither the file nor its place counts any more.
    moved = recipe.override(f"quant.sensitivities={tmp_path / 'gone.json'}")
    result = fit(moved, target, resume=True, progress=False)
    assert result.steps == read_checkpoint(run / LAST).metadata.step
    assert result.model.qvit == read_checkpoint(run / LAST).metadata.student
    assert not (tmp_path / "gone.json").exists()
    with pytest.raises(TrainingError, match=r"quant\.budget_mb=0.0245, now it is 0.025"):
        fit(recipe.override("quant.budget_mb=0.025"), target, resume=True, progress=False)


def test_budgets_that_cannot_be_kept_stop_before_training(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"0.002 MB cannot be met: the smallest that this model can have is 0.02\d MB"):
        fit(tiny_recipe(quant={"budget_mb": 0.002}), tmp_path / "run", progress=False)
    with pytest.raises(BudgetError, match="5 bit operations an image cannot be met"):
        fit(tiny_recipe(quant={"budget_bops": 5}), tmp_path / "run", progress=False)
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(InputError, match="no result file"):
        fit(
            tiny_recipe(quant={"budget_mb": 1, "sensitivities": str(tmp_path / "notes.json")}),
            tmp_path / "run",
            progress=False,
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("outcome", [BudgetError("It cannot be met."), ModelSpec(overrides={"blocks.0.attn.[qkv]": 2})])
def test_other_processes_are_told(tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    """What the first process chose, or why it could not, reaches a process that measures nothing."""

    def broadcast(outcomes: list[Any], src: int) -> None:
        assert (outcomes, src) == ([None], 0)
        outcomes[0] = pickle.loads(pickle.dumps(outcome))

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    second: Any = SimpleNamespace(is_main_process=False, num_processes=2)
    arguments: Any = (tiny_recipe(quant={"budget_mb": 1}), None, [], None, [], second)
    if isinstance(outcome, BudgetError):
        with pytest.raises(BudgetError, match=r"^It cannot be met\.$"):
            spec_within_budget(*arguments)
    else:
        assert spec_within_budget(*arguments) == outcome


def test_float_runs_read_no_budget(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    result = fit(tiny_recipe(method="float", schedule={"epochs": 1}, quant={"budget_mb": 0.001}), tmp_path, progress=False)
    assert not hasattr(result.model, "qvit")


def test_a_file_of_measurements_belongs_to_a_budget() -> None:
    with pytest.raises(RecipeError, match=r"quant\.sensitivities belongs to a budget: set quant\.budget_mb"):
        Recipe.from_dict({"quant": {"sensitivities": "x.json"}})
    for key in ("budget_mb", "budget_bops"):
        with pytest.raises(RecipeError, match=rf"quant\.{key}=0 is out of range: use more than 0"):
            Recipe.from_dict({"quant": {key: 0}})
