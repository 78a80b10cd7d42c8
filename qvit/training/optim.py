"""Parameter groups, optimizer and learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn

from qvit.errors import RecipeError
from qvit.layers.points import quantization_points
from qvit.layers.rectify import Rectify
from qvit.quantizers.lsq import LSQQuantizer
from qvit.training.sections import AnnealSection, OptimSection, ScheduleSection


def parameter_groups(
    model: Any, weight_decay: float, scale_lr_ratio: float, beside: nn.Module | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters of a model, and of what learns ``beside`` it, in up to three groups.

    Each group has its share of the learning rate as ``lr_scale``.

    Matrices decay. Biases, norms, IRM, tokens and position embeddings (timm's convention) do not, and neither do scales and
    offsets of quantizers, which have a learning rate of their own.
    """
    undecayed = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    quantizers = {id(p) for q in quantization_points(model).values() if isinstance(q, LSQQuantizer) for p in q.parameters()}
    rectifiers = {id(p) for module in model.modules() if isinstance(module, Rectify) for p in module.parameters()}
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    steps: list[nn.Parameter] = []
    for name, parameter in [*model.named_parameters(), *(beside.named_parameters() if beside is not None else ())]:
        if not parameter.requires_grad:
            continue
        if id(parameter) in quantizers:
            steps.append(parameter)
        elif parameter.ndim <= 1 or name.endswith(".bias") or name in undecayed or id(parameter) in rectifiers:
            others.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": others, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": steps, "weight_decay": 0.0, "lr_scale": scale_lr_ratio},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, section: OptimSection, beside: nn.Module | None = None) -> torch.optim.Optimizer:
    """The optimizer of a recipe over the parameters of the model, and of what learns ``beside`` it.

    Raises:
        RecipeError: timm knows no such optimizer, or it does not take the arguments given.
    """
    arguments = dict(section.args)
    if section.betas is not None:
        arguments["betas"] = section.betas
    groups = parameter_groups(model, section.weight_decay, section.scale_lr_ratio, beside)
    if section.name in ("adam", "adamw") and all(p.is_cuda for group in groups for p in group["params"]):
        arguments.setdefault("fused", True)  # one kernel for all of a group's parameters
    try:
        optimizer = create_optimizer_v2(groups, opt=section.name, lr=section.lr, weight_decay=section.weight_decay, **arguments)
    except (TypeError, ValueError, AssertionError) as error:
        message = " ".join(str(error).split()).rstrip(".")
        raise RecipeError(f"timm cannot make the optimizer {section.name!r} with {arguments}: {message}.") from None
    # timm drops arguments that the optimizer does not know, rather than say so.
    if ignored := sorted(arguments.keys() - optimizer.defaults.keys()):
        raise RecipeError(f"The optimizer {section.name!r} takes no {ignored[0]}: remove it from optim.")
    return optimizer


def anneal_start(steps_per_epoch: int, schedule: ScheduleSection, anneal: AnnealSection) -> int:
    """The first step in which settled weights are held; the number of steps of the run where there is none."""
    total = schedule.epochs * steps_per_epoch
    return total - math.ceil(anneal.share * total)


def learning_rate(
    step: int, steps_per_epoch: int, lr: float, schedule: ScheduleSection, anneal: AnnealSection | None = None
) -> float:
    """The learning rate of a step, counted from 0: linear warm-up to ``lr``, then half a cosine down to ``schedule.min_lr``.

    Where the run ends in annealing, the cosine ends with its first step, at a hundredth of ``lr`` if ``min_lr`` is 0, and that
    rate stays.
    """
    least, end = schedule.min_lr, schedule.epochs * steps_per_epoch
    if anneal is not None and anneal.share:
        least, end = least or lr / 100, anneal_start(steps_per_epoch, schedule, anneal)
    warmup = schedule.warmup_epochs * steps_per_epoch
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    progress = min((step - warmup) / max(end - warmup, 1), 1)
    return least + (lr - least) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets ``lr`` on every group, times its share."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
