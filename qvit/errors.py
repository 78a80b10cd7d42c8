"""The errors that a user's mistake raises: each message is one sentence that says what is wrong and what to do.

The command line prints the message of a `QvitError` and exits with status 2; anything else is a defect of qvit and keeps
its traceback.
"""


class QvitError(Exception):
    """Base of every error that a user can mend."""


class SpecError(QvitError, ValueError):
    """A quantization spec that cannot be executed on integers, or that names nothing in the model."""


class BudgetError(QvitError, ValueError):
    """A budget that no choice of widths keeps; the message says the smallest that one keeps."""


class NotCalibratedError(QvitError, RuntimeError):
    """A quantized model was run before `qvit.calibrate`."""


class UnsupportedModelError(QvitError, TypeError):
    """A module of the model that qvit cannot quantize; the message names it."""


class WeightsError(QvitError, ValueError):
    """A state dict that does not fit the model, or a file of weights that cannot be read."""


class FileFormatError(QvitError, ValueError):
    """A `.qvit` file that is truncated, corrupted, oversized or of a newer format."""


class InputError(QvitError, ValueError):
    """An image, a folder or an array that the model cannot take."""


class RecipeError(QvitError, ValueError):
    """A training recipe with an unknown key or a value out of range."""


class TrainingError(QvitError, RuntimeError):
    """Training cannot go on (a loss that is not a number, a checkpoint of another run)."""


class SlowerWarning(UserWarning):
    """Something takes a slower path than it was meant to; the message says which and why. A note on the command line."""


class MissingDependencyError(QvitError, ImportError):
    """A part of qvit whose extra is not installed; the message names the extra."""


class StaleBuildError(QvitError, ImportError):
    """The compiled CPU engine was made from other sources than lie beside it; a checkout has to be installed again."""


_TRAIN_PACKAGES = {
    "torch",
    "torchvision",
    "timm",
    "accelerate",
    "pydantic",
    "yaml",
    "sklearn",
    "scipy",
    "tensorboard",
    "matplotlib",
    "jinja2",
}


def missing_package(error: ModuleNotFoundError, what: str) -> MissingDependencyError | None:
    """The error to raise where importing ``what`` failed because a package of an extra is not installed, else ``None``."""
    package = (error.name or "").partition(".")[0]
    if package not in _TRAIN_PACKAGES:
        return None
    return MissingDependencyError(f"{what} needs {package}: pip install 'qvit[train]'.")
