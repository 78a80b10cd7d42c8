"""Feature matching: the student's tokens behind its last block, or behind more of them, against the teacher's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from qvit.errors import TrainingError
from qvit.kernels import switch
from qvit.layers.blocks import transformer_blocks

# A channel in which the teacher is nearly constant counts with this share of the mean variance, so that it does not rule.
_LEAST_VARIANCE = 0.01
_TINY = 1e-12

Features = Sequence[torch.Tensor]


class FeatureTap:
    """Keeps what a model's final norm gives (where there is none, what leaves the last block), [B, N, C], until it is taken.

    A context manager, or persistent until `close`. Attach it before the model is wrapped, as `qvit.distill.taps` says.

    Args:
        model: a timm vision transformer, or a quantized one.
        blocks: also keep what leaves these blocks, counted from 0 and in this order. The last block is never one of them: the
            final norm stands for it.

    Raises:
        TrainingError: the model has no blocks with a norm behind them.
    """

    def __init__(self, model: nn.Module, blocks: Iterable[int] = ()) -> None:
        self._taken: dict[int, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        norm: Any = getattr(model, "norm", None)
        own = transformer_blocks(model)
        if not isinstance(norm, nn.Module) or not own:
            raise TrainingError(
                f"{type(model).__name__} has no features that could be matched: use a timm ViT or Swin as the teacher."
            )
        self._modules = [*(own[block] for block in blocks), norm]
        for place, module in enumerate(self._modules):
            self._handles.append(module.register_forward_hook(self._keeper(place)))

    def _keeper(self, place: int):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            self._taken[place] = output.flatten(1, -2)  # the maps of Swin: [B, rows, columns, C]

        return hook

    def collect(self) -> list[torch.Tensor]:
        """The features of the last forward pass, [B, N, C] each, the final ones last; forgets them.

        Raises:
            TrainingError: the model has not run since the last `collect`.
        """
        if len(self._taken) != len(self._modules):
            raise TrainingError("There are no features to collect: run the tapped model before each collect().")
        taken = [self._taken[place] for place in range(len(self._modules))]
        self.clear()
        return taken

    def clear(self) -> None:
        """Forgets what was kept, say after an evaluation."""
        self._taken.clear()

    def close(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The share of the teacher's variance that the student misses, the mean over channels: a scalar, float32.

    Of each channel the mean squared difference over its variance, both over a batch [B, N, C]: 0 where the two are equal, 1
    for a student that only knows the mean. Channel by channel, since a few channels of a vision transformer are so large that
    they would be all there is of a common distance. No gradient goes to the teacher.

    Raises:
        TrainingError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise TrainingError(
            f"The student's features are {list(student.shape)} and the teacher's {list(teacher.shape)}: use a teacher of the "
            "student's shape, or set the weight of feature to 0."
        )
    if switch.active(student):
        from qvit.kernels.feature_distance import fused_feature_distance  # needs Triton

        return fused_feature_distance(student, teacher, _LEAST_VARIANCE, _TINY)
    target = teacher.detach().float()
    variance = target.var((0, 1), unbiased=False)
    variance = variance.clamp_min(_LEAST_VARIANCE * variance.mean()).clamp_min(_TINY)
    return ((student.float() - target).square().mean((0, 1)) / variance).mean()


def feature_loss(student: Features, teacher: Features) -> torch.Tensor:
    """The mean of `feature_distance` over what two taps kept.

    Source: feature mimicking as in Liang et al., "GPLQ", 2025, here with channels normalised instead of projected onto
    principal components; hidden states of every block as in Zhang et al., "TernaryBERT", 2020.
    """
    return torch.stack([feature_distance(s, t) for s, t in zip(student, teacher, strict=True)]).mean()
