"""A cascade: a student starts from one that was trained at more bits, instead of from the float model.

The weights of such a student have learned to be quantized, and its q and k are rectified. They are taken over as they are;
scales and offsets are calibrated anew for the new widths. The float model remains the teacher.

A run with ``cascade.share`` does both: the first stage is a run of its own in the folder `FIRST_STAGE` of its output, with a
learning rate that rises and falls within it; the second starts from its student. Epochs, steps and seconds of the first are
among the metrics of the second's checkpoints, which need no more of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvit.errors import RecipeError
from qvit.training.checkpoint import LAST, load_student
from qvit.training.logs import METRICS, read_metrics
from qvit.training.recipe import Recipe
from qvit.training.result import TrainingResult

FIRST_STAGE = "first_stage"


def cascade_stages(recipe: Recipe, output: Path) -> tuple[Recipe, Recipe]:
    """The recipes of both stages of a recipe that `Recipe.cascades`, which share its epochs.

    Annealing and oscillation regularisation belong to the end of training, a first stage of activations alone to its beginning.

    Args:
        recipe: of the whole run.
        output: its folder; the first stage's is `FIRST_STAGE` in it.
    """
    first = recipe.first_stage_epochs

    def lasting(count: int) -> list[str]:
        return [f"schedule.epochs={count}", f"schedule.warmup_epochs={min(recipe.schedule.warmup_epochs, count)}"]

    wide = [f"quant.{key}=null" for key in ("weight_bits", "act_bits", "budget_mb", "budget_bops", "sensitivities")]
    wide += [f"quant.bits={recipe.cascade.bits}", "cascade.share=0", "anneal.share=0", "oscillation.weight=0"]
    begins = recipe.override(*wide, *lasting(first))
    # Not as an override, which is YAML: a path may hold characters that YAML does not.
    start = recipe.quant.model_copy(update={"start_from": output / FIRST_STAGE / LAST})
    ends = recipe.model_copy(update={"quant": start})
    return begins, ends.override("activations_first.epochs=0", *lasting(recipe.schedule.epochs - first))


def first_stage_metrics(first: TrainingResult) -> dict[str, float]:
    """What the metrics of the second stage say of the first."""
    return {
        "first_stage_epochs": first.epochs,
        "first_stage_steps": first.steps,
        "first_stage_seconds": first.train_seconds,
    }


def read_stages(output: Path, metrics: Mapping[str, float]) -> list[dict[str, Any]]:
    """The log of a run and, where its ``metrics`` know of one, of its first stage in front, with ``first_stage`` in each line.

    Steps and epochs of the second stage are counted on from those of the first.
    """
    steps, epochs = (int(metrics.get(f"first_stage_{what}", 0)) for what in ("steps", "epochs"))
    first = read_metrics(output / FIRST_STAGE / METRICS) if steps else []
    second = read_metrics(output / METRICS)
    return [
        *({**line, "first_stage": True} for line in first),
        *({**line, "step": line["step"] + steps, "epoch": line["epoch"] + epochs} for line in second),
    ]


def take_over(student: Any, path: Path) -> None:
    """Gives a new student, in place, all that another one learned except for the parameters of its quantizers.

    Args:
        student: what `qvit.quantize` returned, not calibrated.
        path: a checkpoint of a student of the same architecture and preprocessing.

    Raises:
        WeightsError: the file cannot be read, or holds no student.
        RecipeError: it is of another architecture or preprocessing, or only one of the two has IRM.
    """
    other: Any = load_student(path)[0]
    theirs, own = other.qvit, student.qvit
    if theirs.architecture != own.architecture:
        raise RecipeError(f"quant.start_from={path} is a student of another architecture: start from one of the same model.")
    if theirs.preprocessing != own.preprocessing:
        raise RecipeError(
            f"quant.start_from={path} was trained on images of another preprocessing: set data.mean, data.std and "
            "data.crop_pct to what it had."
        )
    if theirs.spec.rectify != own.spec.rectify:
        has, lacks = ("has", "lacks") if theirs.spec.rectify else ("lacks", "has")
        raise RecipeError(f"quant.start_from={path} {has} IRM and this student {lacks} it: use the same method for both.")
    state = student.state_dict()
    learned = {name: value for name, value in other.state_dict().items() if "_quantizer." not in name}
    student.load_state_dict(state | learned)
