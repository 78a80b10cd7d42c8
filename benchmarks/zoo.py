"""timm's model names, each as a model of the same options that is small enough to be tried in milliseconds."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import timm
import torch
from torch import nn

from qvit.convert import family_of
from qvit.errors import UnsupportedModelError

PREFIXES = ("vit_", "deit_", "deit3_", "swin_")
CLASSES = 5
_WIDTH, _HEADS, _DEPTH = 24, 3, 2
_SWIN_DEPTHS, _SWIN_SIZE = (2, 1, 2, 1), 64


@dataclass(frozen=True)
class Kind:
    """Names whose tiny models have one and the same description.

    Attributes:
        family: the module of `qvit.families` that takes them.
        architecture: of the tiny model, without its name.
        names: of timm.
    """

    family: str
    architecture: Any
    names: tuple[str, ...]


@dataclass(frozen=True)
class Refusal:
    """Names that are refused with one and the same sentence."""

    sentence: str
    names: tuple[str, ...]


def names() -> list[str]:
    """Every name of the swept families that this timm knows."""
    return [name for name in timm.list_models() if name.startswith(PREFIXES)]


def tiny(name: str, device: str = "cpu") -> nn.Module:
    """The named model with few narrow blocks, few patches and `CLASSES` classes; all its other options are its own.

    timm's entry points fix most of a model, so what is passed on to the model's class is changed on its way there.
    """
    module = inspect.getmodule(timm.model_entrypoint(name))
    small = mock.patch.object(module, "build_model_with_cfg", _small(module.build_model_with_cfg))  # type: ignore[union-attr]
    with small, torch.device(device):
        return timm.create_model(name)


def _small(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def small(model_cls: Any, variant: str, pretrained: bool, **options: Any) -> nn.Module:
        if "num_heads" in options:  # else it is the convolutional stem of a hybrid
            options |= {"num_classes": CLASSES, **(_small_swin if "depths" in options else _small_vit)(options)}
        return build(model_cls, variant, pretrained, **options)

    return small


def _small_vit(options: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {"depth": _DEPTH}
    if "num_kv_heads" in options:
        small["num_kv_heads"] = (_HEADS,) * _DEPTH
    if "embed_layer" in options:  # made before, for the real width and size
        return small
    patch = options.get("patch_size", 16)
    return small | {"embed_dim": _WIDTH, "num_heads": _HEADS, "img_size": (2 * patch, 3 * patch)}


def _small_swin(options: dict[str, Any]) -> dict[str, Any]:
    """Windows of a third, so that several of them lie side by side, and every stage keeps its number among the others."""
    window = options["window_size"]
    thirds = window // 3 if isinstance(window, int) else tuple(size // 3 for size in window)
    heads = tuple(1 << stage for stage in range(4))
    return {"depths": _SWIN_DEPTHS, "embed_dim": 8, "num_heads": heads, "window_size": thirds, "img_size": _SWIN_SIZE}


def survey(wanted: Sequence[str]) -> tuple[list[Kind], list[Refusal]]:
    """Sorts names into kinds that qvit takes and sentences with which it refuses; no parameter gets a value."""
    taken: dict[tuple[str, Any, bool], list[str]] = {}
    refused: dict[str, list[str]] = {}
    for name in wanted:
        model = tiny(name, device="meta")
        try:
            family = family_of(model)
            family.check(model)
            architecture = dataclasses.replace(family.describe(model), name="")
        except UnsupportedModelError as error:
            refused.setdefault(str(error), []).append(name)
        else:
            # A description has one size, whatever sizes the float model takes.
            dynamic = bool(getattr(model, "dynamic_img_size", False))
            taken.setdefault((family.__name__.rpartition(".")[2], architecture, dynamic), []).append(name)
    kinds = [Kind(family, architecture, tuple(group)) for (family, architecture, _), group in taken.items()]
    return kinds, [Refusal(sentence, tuple(group)) for sentence, group in refused.items()]
