"""The float model that a command is to quantize: timm's, a state dict's, or that of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvit.cli.checkpoints import checkpoint_in
from qvit.cli.spec_options import arguments_of
from qvit.errors import InputError

if TYPE_CHECKING:
    from qvit.preprocessing import Preprocessing
    from qvit.training.checkpoint import Metadata


def float_model(
    name: str | None, checkpoint: Path | None, arguments: list[str], images_as: dict[str, Any]
) -> tuple[Any, Preprocessing, Metadata | None]:
    """The float model, the preprocessing of its images and what its checkpoint says of itself, if it is one of ours.

    Args:
        name: timm's name; not needed with a checkpoint of ours.
        checkpoint: weights, or the folder of a run; timm's pretrained ones by default.
        arguments: ``key=value`` for timm.
        images_as: keys of `qvit.training.sections.DataSection` that change the preprocessing.

    Raises:
        QvitError: there is no such model, or its weights do not fit.
    """
    from qvit.training.checkpoint import is_checkpoint, load_model
    from qvit.training.models import adjusted, build_model
    from qvit.training.recipe import Recipe

    path = None if checkpoint is None else checkpoint_in(checkpoint)
    # Through the recipe, whose error messages say what is wrong with a value.
    described: dict[str, Any] = {"data": images_as}
    if name is not None:
        described["model"] = {"name": name, "args": arguments_of(arguments), "pretrained": path is None, "checkpoint": path}
    recipe = Recipe.from_dict(described)
    known = path is not None and is_checkpoint(path)
    if recipe.model is not None:
        model, preprocessing = build_model(recipe.model, recipe.data)
        return model, preprocessing, load_model(path)[1] if known and path else None
    if path is None:
        raise InputError("There is no model to quantize: name a timm model, or a checkpoint with --checkpoint.")
    if not known:
        raise InputError(f"{path} does not say which model it belongs to: name the timm model before it.")
    model, metadata = load_model(path)
    return model, adjusted(metadata.preprocessing, recipe.data), metadata
