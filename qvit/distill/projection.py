"""Feature matching between models of different shape: a linear map of the student's channels, and the teacher's tokens at the
places of the student's.

The linear maps are learned with the student and are needed in training alone.

Source: hints through a regressor as in Romero et al., "FitNets", 2015; here of tokens, with the teacher's channels
standardised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qvit.distill.features import Features
from qvit.distill.layout import TokenLayout

_TINY = 1e-6


class FeatureProjector(nn.Module):
    """Makes comparable what two taps kept: what it returns goes into `qvit.distill.features.feature_loss`.

    Args:
        student, teacher: layouts of the features, in the order in which they will be given.
    """

    def __init__(self, student: Sequence[TokenLayout], teacher: Sequence[TokenLayout]) -> None:
        super().__init__()
        self._layouts = list(zip(student, teacher, strict=True))
        projections = []
        for place, (own, other) in enumerate(self._layouts):
            projections.append(nn.Linear(own.width, other.width))
            nn.init.trunc_normal_(projections[-1].weight, std=own.width**-0.5)
            nn.init.zeros_(projections[-1].bias)
            self.register_buffer(f"resampling_{place}", _resampling(own, other), persistent=False)
        self.projections = nn.ModuleList(projections)

    def forward(self, student: Features, teacher: Features) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The student's features in the teacher's channels, and the teacher's, standardised, at the student's places.

        Args:
            student, teacher: [B, tokens, width] of the layouts; no gradient goes to the teacher.

        Returns:
            Two lists of [B, M, width of the teacher]. Of every place the map (M tokens of the student's), and before it, where
            both models have a class token, that alone (M = 1): else it would be one of some hundred. Other tokens without a
            place are left out.
        """
        mine, theirs = [], []
        for place, (a, b) in enumerate(zip(student, teacher, strict=True)):
            own, other = self._layouts[place]
            projected = self.projections[place](a)
            if own.has_class_token and other.has_class_token:
                mine.append(projected[:, :1])
                theirs.append(standardised(b[:, :1]))
            matrix: torch.Tensor | None = getattr(self, f"resampling_{place}")
            tokens = b[:, other.prefix :].detach()
            mine.append(projected[:, own.prefix :])
            theirs.append(standardised(tokens if matrix is None else matrix.to(tokens.dtype) @ tokens))
        return mine, theirs


def _resampling(own: TokenLayout, other: TokenLayout) -> torch.Tensor | None:
    if (own.rows, own.columns) == (other.rows, other.columns):
        return None
    return resampling((other.rows, other.columns), (own.rows, own.columns))


def resampling(grid: tuple[int, int], to: tuple[int, int]) -> torch.Tensor:
    """A matrix that resizes a map of tokens, row by row, bilinearly and, where it shrinks, over all that is left out.

    Args:
        grid: (rows, columns) of the map there is.
        to: (rows, columns) wanted.

    Returns:
        float32 [rows x columns wanted, rows x columns there are]; its rows sum to 1.
    """
    tokens = grid[0] * grid[1]
    each: Any = torch.eye(tokens).view(tokens, 1, *grid)
    return F.interpolate(each, to, mode="bilinear", antialias=True, align_corners=False).flatten(1).T.contiguous()


@torch.no_grad()
def standardised(features: torch.Tensor) -> torch.Tensor:
    """Each channel of [B, N, C] with mean 0 and variance 1 over batch and tokens, float32.

    A middle block's channels have means far from 0, to which a bias that is learned at the pace of the weights takes hundreds
    of steps.
    """
    features = features.float()
    variance, mean = torch.var_mean(features, (0, 1), correction=0)
    return (features - mean) * (variance + _TINY * variance.mean()).clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
