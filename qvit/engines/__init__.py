"""Engines that run an `IntegerModel`: one file or folder each, chosen by name with `load`.

Reads `qvit.integer`; nothing below depends on an engine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvit.errors import InputError, MissingDependencyError, UnsupportedModelError
from qvit.integer.model import IntegerModel

if TYPE_CHECKING:
    import torch

ENGINES = ("cpu", "reference")


class Runner:
    """A loaded model, ready to classify: ``runner(images)``.

    Attributes:
        model: the `IntegerModel`.
        engine: what runs it.
    """

    def __init__(self, model: IntegerModel, engine: Any) -> None:
        self.model = model
        self.engine = engine

    def __call__(self, images: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
        """Images -> logits [B, classes], float32, as an array of the kind that came in.

        Args:
            images: [B, C, H, W] of the model's input size, NumPy or PyTorch: uint8 pixels, or floats normalised as the
                model's preprocessing says.

        Raises:
            InputError: another shape or type, or values that are not finite.
        """
        is_array = isinstance(images, np.ndarray)
        array = images if isinstance(images, np.ndarray) else _array_of(images)
        logits = self.engine.run(self._checked(array))
        if is_array:
            return logits
        import torch

        return torch.from_numpy(logits).to(images.device)  # type: ignore[union-attr]

    def _checked(self, images: np.ndarray) -> np.ndarray:
        size = self.model.preprocessing.input_size
        if images.ndim != 4 or images.shape[1:] != tuple(size):
            raise InputError(f"The model takes images [B, {size[0]}, {size[1]}, {size[2]}], not {list(images.shape)}.")
        pixels = getattr(self.engine, "takes_pixels", False)
        if images.dtype == np.uint8:
            return images if pixels else self.model.preprocessing.normalise(images)
        if not np.issubdtype(images.dtype, np.floating):
            raise InputError(f"Images are uint8 pixels or normalised floats, not {images.dtype}.")
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            images = images.astype(np.float32, copy=False)
        if not pixels and not np.isfinite(images).all():  # engines that take pixels check it themselves, faster
            raise InputError("The images hold values that are not finite (NaN or infinity).")
        return images


def _array_of(images: Any) -> np.ndarray:
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(images, torch.Tensor):
        raise InputError(f"Images are a NumPy array or a PyTorch tensor, not {type(images).__name__}.")
    images = images.detach().cpu()
    return (images.float() if images.dtype == torch.bfloat16 else images).numpy()


def default_engine(device: str | None = None) -> str:
    """The engine that `load` takes where none is named: ``cpu`` where it is built and no other device is asked for."""
    if device not in (None, "cpu"):
        return "reference"
    from qvit.engines.cpu import is_built

    return "cpu" if is_built() else "reference"


def load(path: str | Path, engine: str | None = None, device: str | None = None, threads: int | None = None) -> Runner:
    """Loads a `.qvit` file for inference.

    Args:
        path: the file.
        engine: one of `ENGINES`; by default ``cpu`` where it is built and can run the model, else ``reference``.
        device: for engines that run on PyTorch devices: ``cpu``, ``cuda``, ..
        threads: cores that the CPU engine uses for one call; by default the environment variable ``QVIT_NUM_THREADS``, else
            all that the process may use.

    Raises:
        InputError: there is no such file or engine, or ``threads`` is no number of threads.
        FileFormatError: the file is damaged, or of a newer format.
        MissingDependencyError: the engine needs a package that is not installed, or was not built.
        UnsupportedModelError: the engine that was asked for cannot run the model.
    """
    return Runner(model := IntegerModel.load(path), create_engine(model, engine, device, threads))


def create_engine(model: IntegerModel, engine: str | None = None, device: str | None = None, threads: int | None = None) -> Any:
    """The engine of that name for a model; see `load`."""
    name = engine or default_engine(device)
    if name not in ENGINES:
        raise InputError(f"There is no engine {name!r}: use one of {', '.join(ENGINES)}.")
    if name == "cpu":
        if device not in (None, "cpu"):
            raise InputError(f"The engine 'cpu' does not run on the device {device!r}: use engine='reference'.")
        from qvit.engines.cpu import CpuEngine

        try:
            return CpuEngine(model, threads)
        except UnsupportedModelError:
            if engine is not None:
                raise
    try:
        from qvit.engines.reference import ReferenceEngine
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError("The reference engine needs PyTorch: pip install 'qvit[train]'.") from None
    return ReferenceEngine(model, device or "cpu")
