"""From a float timm model to a quantized one, and back from a description to a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import timm.data
from torch import nn

from qvit.architecture import Architecture, SwinArchitecture, architecture_from_dict
from qvit.errors import SpecError, UnsupportedModelError
from qvit.families import swin, vit
from qvit.families.missing import lacks
from qvit.layers.exact import make_exact
from qvit.layers.points import quantization_points
from qvit.preprocessing import Preprocessing
from qvit.spec import ModelSpec

# Model class -> the family that knows it.
_FAMILIES: dict[type, Any] = dict.fromkeys(vit.MODEL_CLASSES, vit) | dict.fromkeys(swin.MODEL_CLASSES, swin)


@dataclass(frozen=True)
class StudentInfo:
    """What a quantized model is, beside its parameters; `quantize` leaves it on the model as ``model.qvit``.

    Attributes:
        architecture: of the float model.
        spec: how it is quantized.
        preprocessing: what its inputs have gone through.
    """

    architecture: Architecture
    spec: ModelSpec
    preprocessing: Preprocessing

    def to_dict(self) -> dict[str, Any]:
        """A JSON object that `from_dict` reads back."""
        return {
            "architecture": self.architecture.to_dict(),
            "spec": self.spec.to_dict(),
            "preprocessing": self.preprocessing.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StudentInfo:
        """Reads what `to_dict` wrote."""
        return cls(
            architecture_from_dict(data["architecture"]),
            ModelSpec.from_dict(data["spec"]),
            Preprocessing.from_dict(data["preprocessing"]),
        )


def family_of(model: nn.Module) -> Any:
    """The module of `qvit.families` that knows the model's class.

    Raises:
        UnsupportedModelError: none does.
    """
    if type(model) in swin.REFUSED:
        raise UnsupportedModelError(f"{type(model).__name__} is not supported: {swin.REFUSED[type(model)]}")
    if type(model) not in _FAMILIES:
        known = ", ".join(sorted(cls.__name__ for cls in _FAMILIES))
        reason = lacks(model) or f"qvit quantizes timm's {known}"
        raise UnsupportedModelError(f"{type(model).__name__} is not supported: {reason}.")
    return _FAMILIES[type(model)]


def preprocessing_of(model: Any) -> Preprocessing:
    """The preprocessing that timm declares for the model, at the model's own input size.

    Raises:
        UnsupportedModelError: the model is of no family that qvit knows.
    """
    family_of(model)
    config = timm.data.resolve_model_data_config(model)
    size = (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)
    mean, std = config["mean"], config["std"]
    if len(mean) != size[0]:
        mean, std = (sum(mean) / len(mean),) * size[0], (sum(std) / len(std),) * size[0]
    interpolation = config["interpolation"] if config["interpolation"] != "random" else "bicubic"
    return Preprocessing(size, config["crop_pct"], config["crop_mode"], interpolation, mean, std)


def quantize(
    model: nn.Module, bits: int | None = None, spec: ModelSpec | None = None, preprocessing: Preprocessing | None = None
) -> nn.Module:
    """A quantized copy of a timm vision transformer; calibrate it before use. The given model is left as it is.

    Args:
        model: a float VisionTransformer, VisionTransformerDistilled or SwinTransformer.
        bits: weights and activations of every block, with the defaults of `ModelSpec`; or give a ``spec``.
        spec: everything about the quantization, overrides included.
        preprocessing: what the images have gone through; by default what timm declares for the model. Its mean and std
            must be those that the images are normalised with, since the patch embedding reads pixels through them.

    Returns:
        A model of the same class with quantized modules and a ``qvit`` attribute (`StudentInfo`).

    Raises:
        UnsupportedModelError: a module that qvit cannot quantize; the message names it.
        SpecError: neither or both of bits and spec, a spec that cannot be executed on this model, or a preprocessing for
            another input size.
    """
    if (bits is None) == (spec is None):
        raise SpecError("Give quantize either bits (2 to 8) or a ModelSpec.")
    spec = ModelSpec.of_bits(bits) if spec is None else spec  # type: ignore[arg-type]
    if hasattr(model, "qvit"):
        raise UnsupportedModelError("The model is quantized already: quantize its float original instead.")
    family = family_of(model)
    family.check(model)
    architecture = family.describe(model)
    preprocessing = preprocessing or preprocessing_of(model)
    takes = (architecture.in_chans, *architecture.img_size)
    if preprocessing.input_size != takes:
        raise SpecError(f"The preprocessing gives an input_size of {preprocessing.input_size}, but the model takes {takes}.")
    student: Any = copy.deepcopy(model)
    family.swap(student, architecture, spec, preprocessing)
    make_exact(student)
    spec.check_overrides(list(quantization_points(student)))
    student.qvit = StudentInfo(architecture, spec, preprocessing)
    return student.to(next(model.parameters()).device).train(model.training)


def build(architecture: Architecture) -> nn.Module:
    """A float timm model of the architecture, with random weights."""
    return swin.build(architecture) if isinstance(architecture, SwinArchitecture) else vit.build(architecture)


def rebuild(info: StudentInfo) -> nn.Module:
    """An uncalibrated student with random weights, for a state dict to be loaded into."""
    return quantize(build(info.architecture), spec=info.spec, preprocessing=info.preprocessing)
