"""Engines that run an `IntegerModel`: one file or folder each, chosen by name with `load`.

Reads `qvit.integer`; nothing below depends on an engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvit.errors import InputError, MissingDependencyError
from qvit.integer.model import IntegerModel

if TYPE_CHECKING:
    import torch

ENGINES = ("reference",)


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
        array = images if isinstance(images, np.ndarray) else images.detach().cpu().numpy()
        logits = self.engine.run(self._checked(array))
        if is_array:
            return logits
        import torch

        return torch.from_numpy(logits).to(images.device)  # type: ignore[union-attr]

    def _checked(self, images: np.ndarray) -> np.ndarray:
        size = self.model.preprocessing.input_size
        if images.ndim != 4 or images.shape[1:] != tuple(size):
            raise InputError(f"The model takes images [B, {size[0]}, {size[1]}, {size[2]}], not {list(images.shape)}.")
        if images.dtype == np.uint8:
            return self.model.preprocessing.normalise(images)
        if not np.issubdtype(images.dtype, np.floating):
            raise InputError(f"Images are uint8 pixels or normalised floats, not {images.dtype}.")
        if not np.isfinite(images).all():
            raise InputError("The images hold values that are not finite (NaN or infinity).")
        return images.astype(np.float32, copy=False)


def load(path: str | Path, engine: str = "reference", device: str | None = None) -> Runner:
    """Loads a `.qvit` file for inference.

    Args:
        path: the file.
        engine: one of `ENGINES`.
        device: for engines that run on PyTorch devices: ``cpu``, ``cuda``, ..

    Raises:
        InputError: there is no such file or engine.
        FileFormatError: the file is damaged, or of a newer format.
        MissingDependencyError: the engine needs a package that is not installed.
    """
    return Runner(model := IntegerModel.load(path), create_engine(model, engine, device))


def create_engine(model: IntegerModel, engine: str = "reference", device: str | None = None) -> Any:
    """The engine of that name for a model; see `load`."""
    if engine not in ENGINES:
        raise InputError(f"There is no engine {engine!r}: use one of {', '.join(ENGINES)}.")
    try:
        from qvit.engines.reference import ReferenceEngine
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError("The reference engine needs PyTorch: pip install 'qvit[train]'.") from None
    return ReferenceEngine(model, device or "cpu")
