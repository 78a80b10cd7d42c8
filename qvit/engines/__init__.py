"""Engines that run an `IntegerModel`: one file or folder each, chosen by name with `load`.

Reads `qvit.integer`; nothing below depends on an engine.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvit.errors import InputError, MissingDependencyError, SlowerWarning, UnsupportedModelError
from qvit.integer.model import IntegerModel

if TYPE_CHECKING:
    import torch

ENGINES = ("cpu", "cuda", "reference")


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
        """Images -> logits [B, classes], float32, as an array of the kind that came in, on the device that it came from.

        With the engine ``cuda`` and uint8 images on its GPU it does not wait for the result, as PyTorch's own operations.

        Args:
            images: [B, C, H, W] of the model's input size, NumPy or PyTorch: uint8 pixels, or floats normalised as the
                model's preprocessing says.

        Raises:
            InputError: another shape or type, or values that are not finite.
        """
        if isinstance(images, np.ndarray):
            return self.engine.run(self._checked(images))
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(images, torch.Tensor):
            raise InputError(f"Images are a NumPy array or a PyTorch tensor, not {type(images).__name__}.")
        if getattr(self.engine, "takes_tensors", False):
            self._check(images.shape, images.dtype == torch.uint8, images.is_floating_point(), images.dtype)
            return self.engine.forward(images).to(images.device)
        array = images.detach().cpu()
        if array.dtype == torch.bfloat16:
            array = array.float()
        return torch.from_numpy(self.engine.run(self._checked(array.numpy()))).to(images.device)

    def _check(self, shape: Sequence[int], are_pixels: bool, are_floats: bool, dtype: object) -> None:
        size = self.model.preprocessing.input_size
        if len(shape) != 4 or tuple(shape[1:]) != tuple(size):
            raise InputError(f"The model takes images [B, {size[0]}, {size[1]}, {size[2]}], not {list(shape)}.")
        if not are_pixels and not are_floats:
            name = str(dtype).removeprefix("torch.")
            raise InputError(f"Images are uint8 pixels or normalised floats, not {name}.")

    def _checked(self, images: np.ndarray) -> np.ndarray:
        self._check(images.shape, images.dtype == np.uint8, np.issubdtype(images.dtype, np.floating), images.dtype)
        pixels = getattr(self.engine, "takes_pixels", False)
        if images.dtype == np.uint8:
            return images if pixels else self.model.preprocessing.normalise(images)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
            images = images.astype(np.float32, copy=False)
        if not pixels and not np.isfinite(images).all():  # engines that take pixels check it themselves, faster
            raise InputError("The images hold values that are not finite (NaN or infinity).")
        return images


def default_engine(device: str | None = None) -> str:
    """The engine that `load` tries first where none is named: the device's own, ``reference`` where there is none."""
    if device not in (None, "cpu"):
        return "cuda" if _is_gpu(device) else "reference"
    from qvit.engines.cpu import is_built

    return "cpu" if is_built() else "reference"


def load(path: str | Path, engine: str | None = None, device: str | None = None, threads: int | None = None) -> Runner:
    """Loads a `.qvit` file for inference.

    Args:
        path: the file.
        engine: one of `ENGINES`; by default ``cuda`` on an NVIDIA GPU and ``cpu`` on the CPU where they can run the model;
            else ``reference``, with a warning that says why: it is slower.
        device: ``cuda`` or ``cuda:<n>`` for the engine ``cuda``; any that PyTorch has for ``reference``, by default ``cpu``.
        threads: cores that the CPU engine uses for one call; by default the environment variable ``QVIT_NUM_THREADS``, else
            all that the process may use.

    Raises:
        InputError: there is no such file, engine or device, or ``threads`` is no number of threads.
        FileFormatError: the file is damaged, or of a newer format.
        MissingDependencyError: the engine needs a package that is not installed, or was not built.
        UnsupportedModelError: the engine that was asked for cannot run the model, or not on this GPU.
        StaleBuildError: the CPU engine was not compiled from the sources beside it.
    """
    return Runner(model := IntegerModel.load(path), create_engine(model, engine, device, threads))


def create_engine(
    model: IntegerModel,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    note: Callable[[str], None] | None = None,
) -> Any:
    """The engine of that name for a model; see `load`.

    ``note`` takes the sentence that says why the reference engine stands in; by default it is a warning.
    """
    name = engine or default_engine(device)
    if name not in ENGINES:
        raise InputError(f"There is no engine {name!r}: use one of {', '.join(ENGINES)}.")
    if name == "reference":
        return _reference(model, device)
    try:
        return _cpu(model, device, threads) if name == "cpu" else _cuda(model, device)
    except (UnsupportedModelError, MissingDependencyError) as error:
        if engine is not None:
            raise
        reason = str(error).partition(": use engine=")[0].rstrip(".")
    slower = _reference(model, device)
    (note or _warn)(f"The reference engine stands in, which is much slower: {reason[:1].lower()}{reason[1:]}.")
    return slower


def _warn(sentence: str) -> None:
    warnings.warn(sentence, SlowerWarning, stacklevel=4)  # at the caller of `load`


def _cpu(model: IntegerModel, device: str | None, threads: int | None) -> Any:
    if device not in (None, "cpu"):
        instead = "cuda" if _is_gpu(device) else "reference"
        raise InputError(f"The engine 'cpu' does not run on the device {device!r}: use engine={instead!r}.")
    from qvit.engines.cpu import CpuEngine

    return CpuEngine(model, threads)


def gpu_named(device: str | None) -> str:
    """The device of the engine ``cuda``, by default ``cuda``; raises `InputError` where it is no NVIDIA GPU's name."""
    if device is None or _is_gpu(device):
        return device or "cuda"
    instead = "cpu" if device == "cpu" else "reference"
    raise InputError(
        f"The engine 'cuda' does not run on the device {device!r}: use device='cuda' (or 'cuda:1'), or engine={instead!r}."
    )


def _cuda(model: IntegerModel, device: str | None) -> Any:
    gpu = gpu_named(device)
    try:
        from qvit.engines.cuda import CudaEngine
    except ModuleNotFoundError as error:
        raise _without_torch(error, "CUDA") from None
    return CudaEngine(model, gpu)


def _reference(model: IntegerModel, device: str | None) -> Any:
    try:
        from qvit.engines.reference import ReferenceEngine
    except ModuleNotFoundError as error:
        raise _without_torch(error, "reference") from None
    return ReferenceEngine(model, device or "cpu")


def _is_gpu(device: str) -> bool:
    return re.fullmatch(r"cuda(:\d+)?", str(device)) is not None


def _without_torch(error: ModuleNotFoundError, engine: str) -> Exception:
    """What to raise where importing an engine failed for want of PyTorch; any other failure as it is."""
    if error.name != "torch":
        return error
    return MissingDependencyError(f"The {engine} engine needs PyTorch: pip install 'qvit[train]'.")
