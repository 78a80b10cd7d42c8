"""A cascade: a student starts from one that was trained at more bits, instead of from the float model.

The weights of such a student have learned to be quantized, and its q and k are rectified. They are taken over as they are;
scales and offsets are calibrated anew for the new widths. The float model remains the teacher.

A run with ``cascade.share`` does both: the first stage is a run of its own in the folder `FIRST_STAGE` of its output, with a
learning rate that rises and falls within it; the second starts from its student.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qvit.errors import RecipeError
from qvit.training.checkpoint import LAST, load_student
from qvit.training.recipe import Recipe

FIRST_STAGE = "first_stage"


def cascade_stages(recipe: Recipe, output: Path) -> tuple[Recipe, Recipe]:
    """The recipes of both stages of a recipe that `Recipe.cascades`, which share its epochs.

    Annealing and oscillation regularisation belong to the end of training, a first stage of activations alone to its beginning.

    Args:
        recipe: of the whole run.
        output: its folder; the first stage's is `FIRST_STAGE` in it.
    """
    epochs, bits = recipe.schedule.epochs, recipe.cascade.bits
    first = min(max(round(recipe.cascade.share * epochs), 1), epochs - 1)

    def lasting(count: int) -> list[str]:
        return [f"schedule.epochs={count}", f"schedule.warmup_epochs={min(recipe.schedule.warmup_epochs, count):g}"]

    wide = [f"quant.{key}=null" for key in ("weight_bits", "act_bits", "budget_mb", "budget_bops", "sensitivities")]
    wide += [f"quant.bits={bits}", "cascade.share=0", "anneal.share=0", "oscillation.weight=0"]
    start = f"quant.start_from={json.dumps(str(output / FIRST_STAGE / LAST))}"
    begins = recipe.override(*wide, *lasting(first))
    return begins, recipe.override(start, "activations_first.epochs=0", *lasting(epochs - first))


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
