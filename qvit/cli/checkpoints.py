"""Checkpoints, as the commands name them, and what a frozen file takes over from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvit.errors import InputError

if TYPE_CHECKING:
    from qvit.training.checkpoint import Metadata

INTEGER_SUFFIX = ".qvit"


def checkpoint_in(path: Path) -> Path:
    """The checkpoint that ``path`` names: itself, or of a run's folder the best one, else the last.

    Raises:
        InputError: the folder holds no checkpoint.
    """
    from qvit.training.checkpoint import BEST, LAST

    if not path.is_dir():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise InputError(f"The folder {path} holds no {BEST} and no {LAST}: name the folder of a run, or a checkpoint.")


def provenance_of(metadata: Metadata) -> dict[str, Any]:
    """What a frozen file says about where it comes from: accuracies in percent, on what data, recipe, library versions."""
    metrics = dict(metadata.metrics)
    recipe = _without_folders(metadata.recipe)
    data = recipe.get("data") or {}
    facts = {
        "float_top1": metrics.get("float_top1"),
        "fake_top1": metrics.get("fake_top1", metrics.get("top1")),
        "images": metrics.get("images"),
        "data": data.get("val") or data.get("train"),
        "epochs": metadata.epochs,
        "method": recipe.get("method"),
    }
    return {
        **{key: value for key, value in facts.items() if value is not None},
        "metrics": metrics,
        "recipe": recipe,
        "versions": dict(metadata.versions),
    }


def _without_folders(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with the files in it named without their folders, which tell more of a machine than of a model."""
    out = {key: _without_folders(value) if isinstance(value, Mapping) else value for key, value in recipe.items()}
    for key in ("train", "val", "checkpoint", "start_from"):
        value = out.get(key)
        if isinstance(value, str):
            out[key] = Path(value).name
        elif isinstance(value, list):
            out[key] = [Path(str(item)).name for item in value]
    return out


def class_names(file: Path | None, otherwise: Sequence[str]) -> list[str]:
    """Class names from a text file, one a line; without a file, ``otherwise``.

    Raises:
        InputError: the file cannot be read, or does not hold as many names.
    """
    if file is None:
        return list(otherwise)
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The class names {file} cannot be read ({getattr(error, 'strerror', None) or 'not a text file'})."
        ) from None
    if len(names) != len(otherwise):
        raise InputError(
            f"{file} holds {len(names)} class names and the model has {len(otherwise)} classes: write one name a line."
        )
    return names
