"""Frozen files on their engine, as the commands name them."""

from __future__ import annotations

from pathlib import Path

from qvit.cli.images import at_least_one, device_of
from qvit.engines import Runner, create_engine, default_engine
from qvit.integer.model import IntegerModel


def open_runner(file: Path, engine: str | None, device: str | None, threads: int | None) -> Runner:
    """The integers of a file on an engine.

    Args:
        file: a .qvit file.
        engine: its name; by default the fastest one for the device.
        device: of the reference engine, by default a GPU where there is one.
        threads: of the CPU engine.

    Raises:
        FileFormatError, InputError, MissingDependencyError: as `qvit.load`; a damaged file is refused before the engine's
            packages are asked for.
    """
    if threads is not None:
        at_least_one("--threads", threads)
    model = IntegerModel.load(file)
    name = engine or default_engine(device)
    # Only the reference engine has devices, and PyTorch to ask for them.
    where = device_of(device) if name == "reference" else device
    return Runner(model, create_engine(model, engine, where, threads))
