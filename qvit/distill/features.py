"""Feature matching: the student's tokens behind its last block against the teacher's."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from qvit.errors import TrainingError

_TINY = 1e-12


class FeatureTap:
    """Keeps what a model's final norm gives (where there is none, what leaves the last block), [B, N, C], until it is taken.

    A context manager, or persistent until `close`. Attach it before the model is wrapped, as `qvit.distill.taps` says.

    Args:
        model: a timm vision transformer, or a quantized one.

    Raises:
        TrainingError: the model has no blocks with a norm behind them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._taken: torch.Tensor | None = None
        norm: Any = getattr(model, "norm", None)
        if not isinstance(norm, nn.Module) or not hasattr(model, "blocks"):
            raise TrainingError(f"{type(model).__name__} has no features that could be matched: use a timm ViT as the teacher.")
        self._handle = norm.register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        self._taken = output

    def collect(self) -> torch.Tensor:
        """The features of the last forward pass, [B, N, C]; forgets them.

        Raises:
            TrainingError: the model has not run since the last `collect`.
        """
        if self._taken is None:
            raise TrainingError("There are no features to collect: run the tapped model before each collect().")
        taken, self._taken = self._taken, None
        return taken

    def clear(self) -> None:
        """Forgets what was kept, say after an evaluation."""
        self._taken = None

    def close(self) -> None:
        """Removes the hook."""
        self._handle.remove()
        self.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def feature_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """``|| student - teacher ||^2 / || teacher ||^2`` over a batch [B, N, C], float32: 0 where they are equal, 1 for zeros.

    Relative, so that its weight means the same for every model. No gradient goes to the teacher.

    Raises:
        TrainingError: the shapes differ.

    Source: feature mimicking as in Liang et al., "GPLQ", 2025, here without its projection onto principal components.
    """
    if student.shape != teacher.shape:
        raise TrainingError(
            f"The student's features are {list(student.shape)} and the teacher's {list(teacher.shape)}: use a teacher of the "
            "student's shape, or set the weight of feature to 0."
        )
    target = teacher.detach().float()
    return (student.float() - target).square().sum() / target.square().sum().clamp_min(_TINY)
