"""Mixed precision in a run: a recipe's budget becomes widths, before the model is quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import timm
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qvit.analyze.budget import Budget, make_plan
from qvit.errors import QvitError
from qvit.preprocessing import Preprocessing
from qvit.spec import ModelSpec
from qvit.training.provenance import without_folders
from qvit.training.recipe import Recipe

# What a frozen file says of a run beside its recipe, its accuracies for the most part: fewer characters than these.
_METRICS = "." * 1024


def spec_within_budget(
    recipe: Recipe,
    model: Any,
    batches: Iterable[Any],
    preprocessing: Preprocessing,
    classes: list[str],
    accelerator: Accelerator,
    progress: bool = False,
) -> ModelSpec:
    """The widths that the budget of ``recipe.quant`` leads to; the first process chooses, the others are told.

    Args:
        recipe: with a budget.
        model: float, on its device.
        batches: the recipe's calibration images.
        preprocessing: of the images.
        classes: names that the frozen file will hold.
        accelerator: of the run.
        progress: show a bar on a terminal.

    Raises:
        QvitError: as `qvit.analyze.budget.make_plan`, in every process.
    """
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [_choose(recipe, model, batches, preprocessing, classes, progress)]
        except QvitError as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], QvitError):
        raise outcome[0]
    return outcome[0]


def _choose(
    recipe: Recipe, model: Any, batches: Iterable[Any], preprocessing: Preprocessing, classes: list[str], progress: bool
) -> ModelSpec:
    q = recipe.quant
    budget = Budget.of(q.budget_mb, q.budget_bops)
    assert budget is not None
    plan = make_plan(
        budget,
        model,
        batches,
        recipe.model_spec(),
        preprocessing,
        classes,
        expected_provenance(recipe),
        q.calibration_images,
        q.sensitivities,
        lambda items, total: _tracked(items, total, progress),
    )
    return plan.spec


def expected_provenance(recipe: Recipe) -> dict[str, Any]:
    """What a file that is frozen from the run will say of it: not the words, but as many of them or a few more."""
    versions = {"torch": str(torch.__version__), "timm": timm.__version__}
    return {"recipe": without_folders(recipe.to_dict()), "versions": versions, "metrics": _METRICS}


def _tracked(items: Iterable[Any], total: int, shown: bool) -> Iterator[Any]:
    console = Console(stderr=True)
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        yield from bar.track(items, total=total, description="measuring sensitivities")
