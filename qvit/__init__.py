"""qvit: low-bit vision transformers that really run low-bit.

    timm model -> quantize -> calibrate -> train -> freeze -> save -> load -> integer inference

Importing qvit is light: PyTorch and timm are imported by the functions that need them, when they are first used, so that the
base install loads a `.qvit` file on a device without them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qvit.errors import QvitError, missing_package

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qvit.calibration import calibrate
    from qvit.convert import quantize
    from qvit.engines import load
    from qvit.integer.freeze import freeze
    from qvit.integer.model import IntegerModel
    from qvit.spec import ModelSpec, QuantSpec
    from qvit.training.engine import train

_PUBLIC = {
    "IntegerModel": "qvit.integer.model",
    "ModelSpec": "qvit.spec",
    "QuantSpec": "qvit.spec",
    "calibrate": "qvit.calibration",
    "freeze": "qvit.integer.freeze",
    "load": "qvit.engines",
    "quantize": "qvit.convert",
    "train": "qvit.training.engine",
}

__all__ = [
    "IntegerModel",
    "ModelSpec",
    "QuantSpec",
    "QvitError",
    "__version__",
    "calibrate",
    "freeze",
    "load",
    "quantize",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'qvit' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    except ModuleNotFoundError as error:
        missing = missing_package(error, f"qvit.{name}")
        if missing is None:
            raise
        raise missing from None


def __dir__() -> list[str]:
    return __all__
