"""The stages of a run: activations first, while weights stay floating point, then weights as well.

In the first stage every weight, those of the edge layers included, is used as it is, and the features behind the last block
are matched with the teacher's. At the switch the weights' learned scales are calibrated from the weights as they are then.
Where a run stands follows from its step alone, so it resumes on either side of the switch, and at it.

Source: Liang et al., "GPLQ: A General, Practical, and Lightning QAT Method for Vision Transformers", 2025.
"""

from __future__ import annotations

from dataclasses import replace

from accelerate import Accelerator
from torch import nn

from qvit.calibration.calibrate import calibrate_weights
from qvit.distill.losses import DistillationLoss
from qvit.layers.weights import quantized_weights
from qvit.training.recipe import Recipe
from qvit.training.setup import share_state


class Stages:
    """Which stage an epoch belongs to, and what it takes.

    Args:
        recipe: of the run.
        model: that is trained.
        loss: of the second stage.
        steps_per_epoch: optimizer steps.
    """

    def __init__(self, recipe: Recipe, model: nn.Module, loss: DistillationLoss, steps_per_epoch: int) -> None:
        self.section, self.model, self.loss = recipe.activations_first, model, loss
        self.epochs = self.section.epochs if recipe.quantized else 0
        self.switch = self.epochs * steps_per_epoch
        self.first_loss = replace(loss, feature=self.section.feature) if self.epochs else loss

    def activations_only(self, epoch: int) -> bool:
        """Whether weights are floating point in an epoch, counted from 0."""
        return epoch < self.epochs

    @property
    def needs_features(self) -> bool:
        """Whether a stage's loss reads features."""
        return bool(self.loss.feature or self.first_loss.feature)

    def enter(self, epoch: int, step: int, accelerator: Accelerator) -> DistillationLoss:
        """Makes the model ready for (the rest of) an epoch, ``step`` steps of the run being done; returns its loss."""
        if not self.epochs:
            return self.loss
        first = self.activations_only(epoch)
        for weight in quantized_weights(self.model):
            weight.layer.weight_quantizer.enabled = not first
        if not first and step == self.switch:
            if accelerator.is_main_process:
                calibrate_weights(self.model)
            if accelerator.num_processes > 1:
                share_state(self.model)
        return self.first_loss if first else self.loss
