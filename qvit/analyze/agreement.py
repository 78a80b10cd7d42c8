"""Whether an engine computes what was trained: the fake-quantized graph against the integers, code by code.

The contract: on real images at least 99.9 % of the codes are equal at every activation point, the logits
lie within 1e-2 of their spread, and the most likely class is the same on at least 99.5 % of the images. Integer sums are
exact, so only the float steps (LayerNorm, softmax, GELU, rectify) can make a difference, by their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from qvit.errors import InputError, UnsupportedModelError
from qvit.layers.points import record_codes

LEAST_CODES = 99.9  # percent, at every activation point
LEAST_TOP1 = 99.5  # percent of the images
LARGEST_DIFFERENCE = 1e-2  # of the logits' standard deviation


class CodeEngine(Protocol):
    """An engine that shows its codes, as `qvit.engines.reference.ReferenceEngine`."""

    def forward(self, images: torch.Tensor, codes: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Normalised images [B, C, H, W] -> logits [B, classes]; fills ``codes`` with those of every activation point."""
        ...


@dataclass(frozen=True)
class Agreement:
    """How far two ways of running one model agree.

    Attributes:
        codes: activation point -> percentage of equal codes.
        top1: percentage of images with the same most likely class.
        logits: largest difference of a logit over the standard deviation of all logits.
        images: compared.
        trained_top1: percentage of images with the same most likely class as the student had before it was rounded; ``None``
            where that was not asked. No part of the contract: rounding moves codes that lie on the edge of two.
    """

    codes: dict[str, float]
    top1: float
    logits: float
    images: int
    trained_top1: float | None = None

    @property
    def worst_point(self) -> str:
        """The activation point with the fewest equal codes, the first of several."""
        return min(self.codes, key=self.codes.__getitem__)

    @property
    def worst_codes(self) -> float:
        """The percentage of equal codes there."""
        return self.codes[self.worst_point]

    @property
    def holds(self) -> bool:
        """Whether the contract is kept."""
        return self.worst_codes >= LEAST_CODES and self.top1 >= LEAST_TOP1 and self.logits <= LARGEST_DIFFERENCE

    def to_row(self) -> dict[str, Any]:
        """The fields of a result file's row: ``agreement`` is that of the top-1."""
        trained = {} if self.trained_top1 is None else {"agreement_before_rounding": self.trained_top1}
        return {
            "agreement": self.top1,
            "codes_agreement": self.worst_codes,
            "worst_point": self.worst_point,
            "logits_difference": self.logits,
            **trained,
        }


@torch.no_grad()
def agreement(
    student: nn.Module,
    engine: CodeEngine,
    images: Iterable[torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]],
    trained: nn.Module | None = None,
) -> Agreement:
    """Runs both on the same images and counts equal codes; memory does not grow with the number of images.

    Args:
        student: the fake-quantized model, rounded as `qvit.freeze` does (`qvit.integer.freeze.round_to_half`).
        engine: of the frozen model.
        images: batches [B, C, H, W], normalised, or tuples that begin with one (a data loader).
        trained: the student before it was rounded, in evaluation mode and on the same device, for ``trained_top1``.

    Raises:
        InputError: there are no images.
        UnsupportedModelError: the two have not the same activation points, so they are not the same model.
    """
    device = next(student.parameters()).device
    equal: dict[str, int] = {}
    total: dict[str, int] = {}
    same = as_trained = count = values = 0
    largest = first = second = 0.0
    training = student.training
    student.eval()
    try:
        for batch in images:
            x = batch if isinstance(batch, torch.Tensor) else batch[0]
            with record_codes(student) as expected:
                wanted = student(x.to(device)).float()
            codes: dict[str, torch.Tensor] = {}
            logits = engine.forward(x, codes).to(device)
            if odd := sorted(expected.keys() ^ codes.keys()):
                raise UnsupportedModelError(f"The engine's model is not the student: only one of them has the point {odd[0]}.")
            for name, code in expected.items():
                if code.shape != codes[name].shape:
                    raise UnsupportedModelError(f"The engine's model is not the student: the shapes at {name} differ.")
                equal[name] = equal.get(name, 0) + int((code == codes[name].to(device)).sum())
                total[name] = total.get(name, 0) + code.numel()
            same += int((wanted.argmax(-1) == logits.argmax(-1)).sum())
            if trained is not None:
                as_trained += int((trained(x.to(device)).argmax(-1) == logits.argmax(-1)).sum())
            count += len(x)
            values += wanted.numel()
            difference = float((wanted - logits).abs().max())
            largest = max(largest, math.inf if math.isnan(difference) else difference)
            first += float(wanted.double().sum())
            second += float(wanted.double().square().sum())
    finally:
        student.train(training)
    if not count:
        raise InputError("There are no images to compare on.")
    spread = math.sqrt(max(second / values - (first / values) ** 2, 0.0))
    return Agreement(
        codes={name: 100 * equal[name] / total[name] for name in total},
        top1=100 * same / count,
        logits=largest / spread if spread else (math.inf if largest else 0.0),
        images=count,
        trained_top1=None if trained is None else 100 * as_trained / count,
    )
