"""Whether a checkpoint belongs to the run that is to go on from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qvit.errors import RecipeError, TrainingError
from qvit.training.checkpoint import Checkpoint
from qvit.training.recipe import Recipe

# What may differ without changing a single weight: where files lie, how they are read and what is reported.
_FREE = (
    "data.train",
    "data.val",
    "data.workers",
    "model.checkpoint",
    "teacher.checkpoint",
    "quant.start_from",
    "quant.sensitivities",
    "needs_gpu",
    "log_every",
    "eval_every",
    "checkpoint_every",
)


def check_same_run(checkpoint: Checkpoint, recipe: Recipe, processes: int) -> None:
    """Raises `TrainingError`, naming the first difference, if the recipe or the number of processes is another one.

    A key that is newer than the checkpoint had its default then.
    """
    _check_same_teacher(checkpoint, recipe)
    before, now = dict(_flat(_completed(checkpoint.metadata.recipe))), dict(_flat(recipe.to_dict()))
    for key in sorted(before.keys() | now.keys()):
        if key not in _FREE and before.get(key) != now.get(key):
            raise TrainingError(
                f"The run in {checkpoint.path.parent} was started with {key}={before.get(key)!r}, now it is {now.get(key)!r}: "
                "resume with the same recipe, or name another output folder."
            )
    if checkpoint.metadata.processes != processes:
        raise TrainingError(
            f"The run in {checkpoint.path.parent} was started with {checkpoint.metadata.processes} processes, now there are "
            f"{processes}: resume with as many."
        )


def _check_same_teacher(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Where one of them has a teacher of its own and the other has not; what `check_same_run` says of keys would not help."""
    run, before = checkpoint.path.parent, checkpoint.metadata.recipe.get("teacher")
    if before and recipe.teacher is None:
        what = before.get("checkpoint") or before.get("name")
        raise TrainingError(
            f"The run in {run} was started with the teacher {what}, now none is named: name it again, or another output folder."
        )
    if recipe.teacher is not None and not before:
        what = recipe.teacher.checkpoint or recipe.teacher.name
        raise TrainingError(
            f"The run in {run} was started without a teacher of its own, now it is {what}: resume without it, or name another "
            "output folder."
        )


def _completed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        return Recipe.from_dict(values).to_dict()
    except RecipeError:  # keys that are gone by now; they will be named as the difference
        return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
