"""`freeze`: from a trained student to an `IntegerModel`. The one file of this room that needs PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from qvit.errors import InputError, NotCalibratedError, UnsupportedModelError
from qvit.integer.model import IntegerModel
from qvit.integer.packing import pack
from qvit.layers.attention import QuantAttention
from qvit.layers.linear import QuantLinear
from qvit.layers.patch_embed import QuantPatchProjection
from qvit.layers.points import quantization_points
from qvit.layers.rectify import Rectify
from qvit.layers.window_attention import QuantWindowAttention
from qvit.quantizers.lsq import LSQQuantizer

_SMALLEST_NORMAL_HALF = 2.0**-14
_LARGEST_HALF = 65504.0


def freeze(
    student: nn.Module, classes: Sequence[str] | None = None, provenance: Mapping[str, Any] | None = None
) -> IntegerModel:
    """Turns a calibrated (and trained) student into integers.

    The float vectors that the file holds (scales, offsets, biases, LayerNorm, position embedding) are float16. So that the
    student and the integer model stay the same function, code by code, the student's vectors are first rounded to these
    values, in place (`round_to_half`).

    Args:
        student: what `qvit.quantize` returned, calibrated.
        classes: names of the outputs; by default their numbers.
        provenance: JSON-able facts to keep in the file: top-1 of float parent and student and on what data, recipe, versions.

    Raises:
        UnsupportedModelError: the model is not quantized.
        NotCalibratedError: it is not calibrated.
        InputError: the number of classes is not the model's, or a parameter is not finite.
    """
    if not hasattr(student, "qvit"):
        raise UnsupportedModelError("The model is not quantized: call qvit.quantize, calibrate and train it before freezing.")
    info: Any = student.qvit
    architecture = info.architecture
    names = [str(i) for i in range(architecture.num_classes)] if classes is None else [str(name) for name in classes]
    if len(names) != architecture.num_classes:
        raise InputError(f"{len(names)} class names were given for a model with {architecture.num_classes} classes.")
    points = quantization_points(student)
    if any(not q.calibrated for q in points.values() if isinstance(q, LSQQuantizer)):
        raise NotCalibratedError("The quantized model is not calibrated: run qvit.calibrate(model, loader) before freezing.")
    for name, parameter in student.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"The parameter {name} is not finite: training diverged; freeze an earlier checkpoint.")
    round_to_half(student)
    tensors: dict[str, np.ndarray] = {}
    with torch.no_grad():
        for name, module in student.named_modules():
            tensors.update({f"{name}.{key}": array for key, array in _tensors_of(module).items()})
        for token in ("cls_token", "dist_token", "reg_token", "pos_embed"):
            value = getattr(student, token, None)
            if value is not None:
                tensors[token] = _stored(value)
    header = {
        "architecture": architecture.to_dict(),
        "specs": {name: quantizer.spec.to_dict() for name, quantizer in points.items()},
        "rectify_eps": next((m.eps for m in student.modules() if isinstance(m, Rectify)), None),
        "preprocessing": info.preprocessing.to_dict(),
        "classes": names,
        "provenance": dict(provenance or {}),
    }
    if info.spec.residual != "float32":
        header["residual"] = info.spec.residual
    return IntegerModel.from_tensors(header, tensors)


@torch.no_grad()
def round_to_half(student: nn.Module) -> None:
    """Rounds every float vector of a student to float16, in place; weights of linear layers keep their precision.

    A tensor stays float32 where float16 could not hold it: magnitudes above 65504, or scales below 2^-14.
    """
    for name, parameter in _vectors(student):
        if name.endswith("_quantizer.scale"):
            parameter.clamp_(min=1e-8)
        if _fits_half(parameter, name):
            parameter.copy_(parameter.half().to(parameter.dtype))


@contextmanager
def rounded_to_half(student: nn.Module, keep: bool = False) -> Iterator[None]:
    """Within it, a student is what its frozen file will be (`round_to_half`); with ``keep`` it remains so, but for an error."""
    before = [(parameter, parameter.detach().clone()) for _, parameter in _vectors(student)]
    done = False
    try:
        round_to_half(student)
        yield
        done = True
    finally:
        if not (keep and done):
            with torch.no_grad():
                for parameter, value in before:
                    parameter.copy_(value)


def _vectors(student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters but for the weights of linear layers, with their names."""
    weights = {m.weight for m in student.modules() if isinstance(m, (QuantLinear, QuantPatchProjection))}
    return ((name, parameter) for name, parameter in student.named_parameters() if parameter not in weights)


def _fits_half(x: torch.Tensor, name: str) -> bool:
    largest, smallest = x.abs().max().item(), x.abs().min().item()
    return largest <= _LARGEST_HALF and (not name.endswith("scale") or smallest >= _SMALLEST_NORMAL_HALF)


def _stored(x: torch.Tensor) -> np.ndarray:
    """float16 if that loses nothing, else float32."""
    x = x.detach().float().cpu()
    half = x.half()
    return (half if torch.equal(half.float(), x) else x).numpy()


def _tensors_of(module: nn.Module) -> dict[str, np.ndarray]:
    """What a module itself, without its children, adds to the file."""
    if isinstance(module, (QuantLinear, QuantPatchProjection)):
        weight = module.effective_weight() if isinstance(module, QuantPatchProjection) else module.weight
        quantized = module.weight_quantizer(weight)
        codes = quantized.codes.to(torch.int16).cpu().numpy()
        out = {"weight": pack(codes, quantized.spec.bits), "weight_scale": _stored(quantized.scale)}
        if module.bias is not None:
            out["bias"] = _stored(module.bias)
        return {**out, **_point(module.input_quantizer, "input")} if isinstance(module, QuantLinear) else out
    if isinstance(module, QuantAttention):
        out = {}
        for name in ("q", "k", "v", "map"):
            out.update(_point(getattr(module, f"{name}_quantizer"), name))
        if isinstance(module, QuantWindowAttention):
            out["relative_position_bias_table"] = _stored(module.relative_position_bias_table)
        return out
    if isinstance(module, (nn.LayerNorm, Rectify)):
        return {"weight": _stored(module.weight), "bias": _stored(module.bias)}
    gamma = getattr(module, "gamma", None)  # timm's LayerScale, of which it has two classes
    return {"gamma": _stored(gamma)} if isinstance(gamma, nn.Parameter) else {}


def _point(quantizer: Any, name: str) -> dict[str, np.ndarray]:
    out = {f"{name}_scale": _stored(quantizer.effective_scale())}
    if quantizer.offset is not None:
        out[f"{name}_offset"] = _stored(quantizer.offset)
    return out
