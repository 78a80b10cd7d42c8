"""Frozen files on their engine, as the commands name them."""

from __future__ import annotations

from pathlib import Path

from qvit.cli.images import at_least_one, device_of
from qvit.cli.show import note
from qvit.engines import Runner, create_engine, default_engine
from qvit.integer.model import IntegerModel


def open_runner(file: Path, engine: str | None, device: str | None, threads: int | None) -> Runner:
    """The integers of a file on an engine.

    Args:
        file: a .qvit file.
        engine: its name; by default the fastest one for the device.
        device: of the engines that run on PyTorch; by default a GPU, for the reference engine where there is one.
        threads: of the CPU engine.

    Raises:
        FileFormatError, InputError, MissingDependencyError: as `qvit.load`; a damaged file is refused before the engine's
            packages are asked for.
    """
    if threads is not None:
        at_least_one("--threads", threads)
    model = IntegerModel.load(file)
    name = engine or default_engine(device)
    # An engine that was asked for says itself what it does not run on; the reference engine runs on what PyTorch has, and may
    # have to stand in for the CUDA engine.
    where = device_of(device) if name == "reference" or (engine is None and name == "cuda") else device
    return Runner(model, create_engine(model, engine, where, threads, note))
