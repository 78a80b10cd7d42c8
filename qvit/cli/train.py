"""``qvit train``: trains what a recipe describes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvit.cli import options
from qvit.cli.budget import show_chosen
from qvit.cli.checkpoints import checkpoint_in
from qvit.cli.images import location_of, name_of
from qvit.cli.results import write_results
from qvit.cli.show import show_facts
from qvit.errors import RecipeError

if TYPE_CHECKING:
    from qvit.training.loop import TrainingResult
    from qvit.training.recipe import Recipe


def command(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe that comes with qvit, or the path of a YAML file.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the run: checkpoints and logs.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Images with 'train' and 'val' folders: a folder, tar files, or 'digits'."),
    ] = None,
    train_data: Annotated[list[str] | None, typer.Option("--train-data", help="Training images; may be given again.")] = None,
    val_data: Annotated[list[str] | None, typer.Option("--val-data", help="Validation images; may be given again.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="Float run or weights to start from instead of the recipe's.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Float run or weights of the teacher instead of the recipe's.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value that changes the recipe (quant.bits=2); may be given again."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder, if there is one.")] = False,
    json: options.Json = None,
) -> None:
    """Train a model as a recipe says.

    A quantized one is calibrated first. Ctrl-C saves the state; --resume goes on from it.

    Example:

        qvit train digits_float -o runs/digits_float

        qvit train digits --checkpoint runs/digits_float --set quant.bits=2 -o runs/digits_w2a2

    On several GPUs:

        torchrun --nproc-per-node 8 -m qvit.cli.main train paper_imagenet --data /data/imagenet -o runs/w4a4
    """
    from qvit.training.engine import fit
    from qvit.training.recipe import Recipe

    described = _with_data(Recipe.load(recipe, set_ or []), data, train_data, val_data)
    described = _with_weights(described, "model", checkpoint)
    described = _with_teacher(described, teacher)
    result = fit(described, output, resume=resume)
    if os.environ.get("RANK", "0") != "0":
        return
    row = _row(described, result)
    student = getattr(result.model, "qvit", None)
    if student is not None and described.quant.has_budget:
        budget = {"budget_mb": described.quant.budget_mb, "budget_bops": described.quant.budget_bops}
        row |= {key: value for key, value in budget.items() if value is not None} | show_chosen(student)
    epochs = "1 epoch" if result.epochs == 1 else f"{result.epochs} epochs"
    rate = f", {result.train_images_per_s:.0f} images/s" if result.train_images_per_s else ""  # a finished run, resumed
    show_facts(
        {
            "run": result.output,
            "top-1": f"{result.top1:.2f} % of {result.images} images after {epochs}",
            "best": f"{result.best_top1:.2f} % after epoch {result.best_epoch}",
            "trained": f"{result.train_seconds:.1f} s{rate}",
        }
    )
    write_results(json, [row])


def _with_data(recipe: Recipe, data: list[str] | None, train: list[str] | None, val: list[str] | None) -> Recipe:
    if data and (train or val):
        raise RecipeError("Give either --data, for both, or --train-data and --val-data.")
    changes: dict[str, Any] = {}
    if data:
        changes = {"train": location_of(data), "val": None}
    if train:
        changes["train"] = location_of(train)
    if val:
        changes["val"] = location_of(val)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})


def _with_weights(recipe: Recipe, section: str, path: Path | None) -> Recipe:
    """The recipe with other weights in the section ``model`` or ``teacher``."""
    if path is None:
        return recipe
    own = getattr(recipe, section)
    if own is None:
        raise RecipeError(f"The recipe does not say which model {path} belongs to: set {section}.name.")
    return recipe.model_copy(update={section: own.model_copy(update={"checkpoint": checkpoint_in(path), "pretrained": False})})


def _with_teacher(recipe: Recipe, path: Path | None) -> Recipe:
    """The recipe with the teacher of ``--teacher``: the model that a checkpoint describes, or weights of the recipe's teacher,
    else model. So the run's checkpoints say who taught it, and `--resume` notices where that is another."""
    if path is None:
        return recipe
    from qvit.training.checkpoint import is_checkpoint
    from qvit.training.sections import ModelSection

    path = checkpoint_in(path)
    if is_checkpoint(path):
        return recipe.model_copy(update={"teacher": ModelSection(checkpoint=path)})
    recipe = recipe.model_copy(update={"teacher": recipe.teacher or recipe.model})
    return _with_weights(recipe, "teacher", path)


def _row(recipe: Recipe, result: TrainingResult) -> dict[str, Any]:
    from qvit.convert import family_of

    student = getattr(result.model, "qvit", None)
    architecture = student.architecture if student else family_of(result.model).describe(result.model)
    locations = recipe.data.val or recipe.data.train or ""
    row: dict[str, Any] = {
        "model": architecture.name,
        "data": name_of([locations] if isinstance(locations, str) else locations),
        "method": recipe.method,
        "weight_bits": student.spec.weight_bits if student else 32,
        "act_bits": student.spec.act_bits if student else 32,
        "residual": student.spec.residual if student else "float32",
        "seed": recipe.seed,
        "fake_top1" if student else "float_top1": result.top1,
        "best_top1": result.best_top1,
        "best_epoch": result.best_epoch,
        "images": result.images,
        "epochs": result.epochs,
        "steps": result.steps,
        "train_seconds": result.train_seconds,
        "train_images_per_s": result.train_images_per_s,
        "loader_idle": result.loader_idle,
        "peak_gb": result.peak_gb,
    }
    return row
