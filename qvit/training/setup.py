"""What a run needs before its first step: images, the model (quantized and calibrated) and the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from qvit.calibration import calibrate
from qvit.convert import preprocessing_of, quantize
from qvit.distill.layout import matched_blocks, token_layouts
from qvit.distill.losses import DistillationLoss
from qvit.distill.projection import FeatureProjector
from qvit.errors import InputError, RecipeError, TrainingError
from qvit.layers.points import quantization_points
from qvit.preprocessing import Preprocessing
from qvit.quantizers.lsq import LSQQuantizer
from qvit.sources import ImageSource
from qvit.spec import ModelSpec
from qvit.training.cascade import take_over
from qvit.training.checkpoint import Checkpoint
from qvit.training.data import check_classes, evaluation_loader, open_split
from qvit.training.mixed import spec_within_budget
from qvit.training.models import adjusted, build_model, top1_of
from qvit.training.recipe import Recipe
from qvit.training.seeding import derive_seed, seed_everything
from qvit.training.teachers import check_teacher
from qvit.training.weight_selection import select_weights

_CALIBRATION_BATCH = 32


@dataclass(frozen=True)
class Setup:
    """A run's parts, on its device.

    Attributes:
        model: to train: float, or quantized and calibrated.
        teacher: float, in evaluation mode; ``None`` where the loss reads none.
        loss: what is minimised.
        projector: learns beside a float model to compare its features with the teacher's; ``None`` where they are equal in
            shape or not compared.
        preprocessing: of the images.
        train, val: the images.
        float_top1: what the student's float checkpoint says it reached, in percent; ``None`` where that is not known.
    """

    model: nn.Module
    teacher: nn.Module | None
    loss: DistillationLoss
    projector: FeatureProjector | None
    preprocessing: Preprocessing
    train: ImageSource
    val: ImageSource
    float_top1: float | None


def set_up(
    recipe: Recipe,
    accelerator: Accelerator,
    model: Any | None,
    teacher: Any | None,
    resumed: Checkpoint | None,
    progress: bool = False,
    spec: ModelSpec | None = None,
) -> Setup:
    """Builds what a recipe describes; see `qvit.training.engine.fit` for the arguments.

    With a budget, a model's bits are chosen here, unless they are in ``spec`` (`spec_of_budget`); a resumed one's are taken
    from the checkpoint.

    A model that is not calibrated is calibrated by the first process alone, and its parameters and buffers go from there to
    the others; a resumed one takes them from the checkpoint instead.

    Raises:
        QvitError: something does not fit; no training has begun.
    """
    seed_everything(recipe.seed)
    train, val = open_split(recipe.data, "train"), open_split(recipe.data, "val")
    float_top1 = top1_of(recipe.model) if recipe.quantized and recipe.model and model is None else None
    model, preprocessing = _start(recipe, model)
    check_classes(train, model.num_classes, "training")
    if train.classes != val.classes:
        raise InputError("The validation images have other classes than the training images: use the same class folders.")

    loss = loss_of(recipe, taught=teacher is not None or recipe.teacher is not None)
    original = None if hasattr(model, "qvit") else model
    if recipe.quantized and original is not None:
        if not recipe.quant.has_budget:
            spec = recipe.model_spec()
        elif resumed is not None and resumed.metadata.student is not None:
            spec = resumed.metadata.student.spec
        elif spec is None:
            spec = _chosen(recipe, original, train, preprocessing, accelerator, progress)
        model = quantize(original, spec=spec, preprocessing=preprocessing)
    elif not recipe.quantized and original is None:
        raise RecipeError("The method float trains a float model, but the model is quantized: choose another method.")
    if loss.needs_teacher or (recipe.quantized and recipe.needs_features):
        teacher = _teacher(recipe, teacher, original, model, preprocessing).to(accelerator.device).eval()
    else:
        teacher = None
    projector = _projector(recipe, model, teacher) if loss.feature and not recipe.quantized else None

    if teacher is not None and resumed is None and not recipe.quantized and recipe.distill.start_from_teacher:
        select_weights(model, teacher)
    model.to(accelerator.device)
    if projector is not None:
        projector.to(accelerator.device)
    if resumed is not None:
        _restore(model, resumed.model_state(), resumed)
        if projector is not None:
            _restore(projector, resumed.projector_state(), resumed)
    else:
        if recipe.quantized and accelerator.is_main_process and not _calibrated(model):
            start = recipe.quant.start_from
            if start is not None:
                take_over(model, start)
            batches = calibration_batches(recipe, train, preprocessing)
            calibrate(model, batches, images=recipe.quant.calibration_images, scales_only=start is not None)
        if accelerator.num_processes > 1:
            share_state(model)
            if projector is not None:
                share_state(projector)
    return Setup(model, teacher, loss, projector, preprocessing, train, val, float_top1)


def spec_of_budget(recipe: Recipe, accelerator: Accelerator, model: Any | None, progress: bool = False) -> ModelSpec:
    """What the budget of a recipe leads to, before its run is set up; see `qvit.training.engine.fit` for the arguments.

    Raises:
        QvitError: as `qvit.analyze.budget.make_plan`, or images or weights do not fit.
    """
    seed_everything(recipe.seed)
    train = open_split(recipe.data, "train")
    original, preprocessing = _start(recipe, model)
    check_classes(train, original.num_classes, "training")
    return _chosen(recipe, original, train, preprocessing, accelerator, progress)


def _chosen(
    recipe: Recipe, original: Any, train: ImageSource, preprocessing: Preprocessing, accelerator: Accelerator, progress: bool
) -> ModelSpec:
    batches = calibration_batches(recipe, train, preprocessing)
    original.to(accelerator.device)
    return spec_within_budget(recipe, original, batches, preprocessing, train.classes, accelerator, progress)


def loss_of(recipe: Recipe, taught: bool) -> DistillationLoss:
    """The loss of a recipe; for the method ``float`` labels alone, or where it is ``taught``, with what the teacher gives."""
    d = recipe.distill
    if not recipe.quantized:
        if not taught:
            return DistillationLoss(label=1, hard=0)
        return DistillationLoss(d.label, d.hard, d.soft, d.temperature, feature=d.feature)
    return DistillationLoss(d.label, d.hard, d.soft, d.temperature, recipe.dgd_weight, d.feature)


def _start(recipe: Recipe, model: Any | None) -> tuple[Any, Preprocessing]:
    """The model to start from, and the preprocessing of its images."""
    if model is None:
        if recipe.model is None:
            raise RecipeError("The recipe names no model: set model.name, or pass a model.")
        return build_model(recipe.model, recipe.data)
    if hasattr(model, "qvit"):
        return model, model.qvit.preprocessing
    return model, adjusted(preprocessing_of(model), recipe.data)


def _teacher(recipe: Recipe, teacher: Any | None, original: Any | None, model: Any, preprocessing: Preprocessing) -> Any:
    """The teacher that was passed, or the recipe's, or else the float model that the student was made from."""
    own = None
    if teacher is None and recipe.teacher is not None:
        teacher, own = build_model(recipe.teacher, recipe.data)
    teacher = original if teacher is None else teacher
    if teacher is None:
        raise RecipeError("The loss needs a teacher: pass a float model, or set distill.hard, soft, dgd and feature to 0.")
    features = recipe.distill.feature_blocks if recipe.needs_features else None
    check_teacher(teacher, model, bool(recipe.dgd_weight), features, projected=not recipe.quantized)
    # Only now: of a teacher for other images, the number of channels is what to name.
    if own is not None and (own.mean, own.std) != (preprocessing.mean, preprocessing.std):
        raise RecipeError(
            f"The teacher's images have mean {own.mean} and std {own.std}, the student's {preprocessing.mean} and "
            f"{preprocessing.std}: set data.mean and data.std to what both were trained with."
        )
    return teacher


def _projector(recipe: Recipe, model: Any, teacher: Any) -> FeatureProjector:
    own, other = token_layouts(model), token_layouts(teacher)
    pairs = matched_blocks(len(own), len(other), recipe.distill.feature_blocks)
    return FeatureProjector([own[block] for block, _ in pairs], [other[block] for _, block in pairs])


def _calibrated(student: nn.Module) -> bool:
    return all(bool(q.calibrated) for q in quantization_points(student).values() if isinstance(q, LSQQuantizer))


def calibration_batches(recipe: Recipe, source: ImageSource, preprocessing: Preprocessing) -> DataLoader[Any]:
    """Batches of training images as they are evaluated, drawn with the recipe's seed."""
    drawn = np.random.default_rng(derive_seed(recipe.seed)).permutation(len(source))[: recipe.quant.calibration_images]
    return evaluation_loader(source, preprocessing, _CALIBRATION_BATCH, indices=drawn.tolist())


def _restore(module: nn.Module, state: dict[str, torch.Tensor], checkpoint: Checkpoint) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError:
        raise TrainingError(f"{checkpoint.path} belongs to another model than this run's: start a new run.") from None


def share_state(model: nn.Module) -> None:
    """Gives every process the parameters and buffers of the first."""
    state = model.state_dict()
    for tensor in state.values():
        # gloo sends no booleans, but their bytes.
        torch.distributed.broadcast(tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor, src=0)
    # Lets quantizers take note of what they were given.
    model.load_state_dict(state)
