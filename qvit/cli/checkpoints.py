"""Checkpoints and class names, as the commands name them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qvit.errors import InputError

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
