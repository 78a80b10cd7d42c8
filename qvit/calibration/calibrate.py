"""`calibrate`: equalisation, IRM initialisation and MSE-optimal scales and offsets, block after block."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qvit.calibration.equalise import equalise_norm, equalise_values, factors_of
from qvit.calibration.rectify_init import initialise_rectify
from qvit.convert import family_of
from qvit.errors import InputError, UnsupportedModelError
from qvit.layers.linear import QuantLinear
from qvit.layers.points import float_mode, quantization_points
from qvit.layers.weights import quantized_weights
from qvit.quantizers.lsq import LSQQuantizer
from qvit.quantizers.mse_search import mse_optimal
from qvit.quantizers.statsq import StatsQuantizer
from qvit.spec import PerToken

_VALUES_PER_POINT = 1 << 19  # of one quantization point that the search looks at
_BATCH = 16  # images that go through a block at once; bounds the memory that softmax maps take


def calibrate(
    student: Any,
    batches: Iterable[torch.Tensor | tuple[torch.Tensor, ...] | list[torch.Tensor]],
    images: int = 64,
    scales_only: bool = False,
) -> None:
    """Prepares a quantized model, in place, from a few images; call it once, before the optimizer and before DDP.

    Block after block, each on the inputs that the blocks before it produce in floating point: equalises, initialises IRM so
    that the float function is kept, then sets the scale and offset of every quantizer to those of least squared error.

    Args:
        student: what `qvit.quantize` returned (a `torch.nn.Module`).
        batches: image batches [B, C, H, W], normalised as the model's preprocessing says, or tuples that begin with one
            (a data loader).
        images: how many images to use.
        scales_only: neither equalise nor initialise IRM: the weights come from a student that went through both.

    Raises:
        UnsupportedModelError: the model is not quantized.
        InputError: no images, images of another size or not normalised as declared.
    """
    if not hasattr(student, "qvit"):
        raise UnsupportedModelError("The model is not quantized: call qvit.quantize(model, bits=4) first.")
    family = family_of(student)
    device = next(student.parameters()).device
    x = gather_images(batches, images, student.qvit.preprocessing.input_size).to(device)
    _check_pixels(student, x)
    training = student.training
    student.eval()
    try:
        with torch.no_grad(), float_mode(student):
            tokens = torch.cat([family.stem(student, part) for part in x.split(_BATCH)])
            for merging, blocks in family.stages(student):
                if merging is not None:
                    if not scales_only and student.qvit.spec.equalise:
                        _prepare_merging(merging, tokens)
                    tokens = _calibrate_part(merging, tokens)
                for block in blocks:
                    if not scales_only:
                        _prepare_block(family, block, tokens, student.qvit.spec.equalise)
                    tokens = _calibrate_part(block, tokens)
            heads = nn.ModuleList([student.get_submodule(name) for name in student.qvit.architecture.heads])
            with _observing(heads) as samples:
                for part in tokens.split(_BATCH):
                    family.tail(student, part)
            _search(heads, samples, len(x))
            _fit_weight(student.patch_embed.proj.weight_quantizer, student.patch_embed.proj.effective_weight())
    finally:
        student.train(training)


@torch.no_grad()
def calibrate_weights(student: nn.Module) -> None:
    """Sets the learned scales of all weights, and nothing else, to those of least squared error on the weights as they are."""
    for weight in quantized_weights(student):
        _fit_weight(weight.layer.weight_quantizer, weight.effective())


def gather_images(batches: Iterable, images: int, size: tuple[int, ...]) -> torch.Tensor:
    """The first ``images`` images of batches as `calibrate` takes them, or all if there are fewer: [S, C, H, W], float32.

    Raises:
        InputError: there are none, or they are of another ``size`` (C, H, W).
    """
    taken: list[torch.Tensor] = []
    missing = images
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        if not isinstance(x, torch.Tensor) or x.dim() != 4 or tuple(x.shape[1:]) != tuple(size):
            shape = tuple(x.shape) if hasattr(x, "shape") else type(x).__name__
            raise InputError(f"Calibration needs image batches [B, {', '.join(map(str, size))}], not {shape}.")
        taken.append(x[:missing].float())
        missing -= len(taken[-1])
        if missing <= 0:
            break
    if not taken or not sum(map(len, taken)):
        raise InputError("Calibration got no images: pass a loader or a list of image batches that is not empty.")
    return torch.cat(taken)


def _check_pixels(student: Any, x: torch.Tensor) -> None:
    """Images that were normalised otherwise than declared would be clipped at the pixel grid, silently."""
    preprocessing = student.qvit.preprocessing
    std = torch.tensor(preprocessing.std, device=x.device)[:, None, None]
    mean = torch.tensor(preprocessing.mean, device=x.device)[:, None, None]
    pixels = x * std + mean
    outside = ((pixels < -0.02) | (pixels > 1.02)).float().mean().item()
    if outside > 0.01:
        raise InputError(
            f"{outside:.0%} of the calibration pixels lie outside [0, 1] once mean {preprocessing.mean} and std "
            f"{preprocessing.std} are undone: pass qvit.quantize the preprocessing that the images have really gone through."
        )


def _prepare_merging(merging: Any, tokens: torch.Tensor) -> None:
    """Equalises one patch merging, in float mode on its inputs [S, rows, columns, C]; the float function stays."""
    seen: list[torch.Tensor] = []
    handle = merging.reduction.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    for part in tokens.split(_BATCH):
        merging(part)
    handle.remove()
    equalise_norm(merging.norm, merging.reduction, factors_of(torch.cat(seen)))


def _prepare_block(family: Any, block: Any, tokens: torch.Tensor, equalise: bool) -> None:
    """Equalises one block and initialises its IRM, in float mode on its inputs [S, .., C]; the float function stays."""
    attention, mlp = block.attn, block.mlp
    if equalise:
        normed = block.norm1(tokens)
        equalise_norm(block.norm1, attention.qkv, factors_of(normed))
        normed = block.norm1(tokens)
        width = attention.proj.in_features
        equalise_values(attention.qkv, attention.proj, factors_of(attention.qkv(normed)[..., -width:]))
    if not isinstance(attention.rectify_q, nn.Identity):
        # Which window a token lies in makes no difference: IRM is fitted to all tokens alike.
        initialise_rectify(attention, block.norm1(tokens).flatten(1, -2))
    if equalise:
        # norm2 sees what attention adds; IRM is in place by now.
        middle = torch.cat([family.after_attention(block, part) for part in tokens.split(_BATCH)])
        equalise_norm(block.norm2, mlp.fc1, factors_of(block.norm2(middle)))


def _calibrate_part(part: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Sets the scales and offsets of one block or patch merging in float mode on its inputs [S, .., C]; returns its outputs."""
    with _observing(part) as samples:
        out = torch.cat([part(some) for some in tokens.split(_BATCH)])
    _search(part, samples, len(tokens))
    return out


@contextmanager
def _observing(module: nn.Module):  # type: ignore[no-untyped-def]
    """Within it, the activations that reach every quantizer of ``module`` are sampled: yields {quantizer: [tensors]}."""
    samples: dict[LSQQuantizer, list[torch.Tensor]] = {}
    quantizers = [q for q in quantization_points(module).values() if isinstance(q, LSQQuantizer)]
    for quantizer in quantizers:
        samples[quantizer] = []
        quantizer.observer = samples[quantizer].append
    try:
        yield samples
    finally:
        for quantizer in quantizers:
            quantizer.observer = None


def _search(module: nn.Module, samples: dict[LSQQuantizer, list[torch.Tensor]], images: int) -> None:
    """Sets every quantizer of ``module``: activations from their samples of so many images, weights from themselves."""
    for quantizer, seen in samples.items():
        if seen:
            x = _thin(torch.cat(seen), quantizer, images)
            quantizer.set_parameters(*mse_optimal(x, quantizer.spec, quantizer.scale.shape, _offset_shape(quantizer)))
    for layer in module.modules():
        if isinstance(layer, QuantLinear):
            _fit_weight(layer.weight_quantizer, layer.weight)


def _fit_weight(quantizer: LSQQuantizer | StatsQuantizer, weight: torch.Tensor) -> None:
    if isinstance(quantizer, StatsQuantizer):
        return
    quantizer.set_parameters(*mse_optimal(weight, quantizer.spec, quantizer.scale.shape, None))


def _offset_shape(quantizer: LSQQuantizer) -> tuple[int, ...] | None:
    return None if quantizer.offset is None else tuple(quantizer.offset.shape)


def _thin(x: torch.Tensor, quantizer: LSQQuantizer, images: int) -> torch.Tensor:
    """An evenly spaced part of a sample [S, .., N, C]: fewer tokens where no parameter follows them, then fewer images.

    Where S counts windows, there are fewer windows first, not less than one for each of the ``images``.
    """
    if len(x) > images:
        x = _fewer(x, max(images, len(x) * _VALUES_PER_POINT // x.numel()))
    if x.dim() > 2 and not isinstance(quantizer.spec.scale, PerToken):
        rows = max(1, x.shape[-2] * _VALUES_PER_POINT // x.numel())
        if rows < x.shape[-2]:
            index = torch.linspace(0, x.shape[-2] - 1, rows, device=x.device).round().long()
            x = x.index_select(-2, index)
    return _fewer(x, max(1, len(x) * _VALUES_PER_POINT // x.numel()))


def _fewer(x: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` evenly spaced ones of x [S, ..], or all if there are no more."""
    return x[torch.linspace(0, len(x) - 1, count, device=x.device).round().long()] if count < len(x) else x
