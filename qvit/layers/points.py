"""Quantization points of a model: what they are called, how to switch them off, how to watch their codes.

A point's name is its path in the model with the ending ``_quantizer`` left out: ``blocks.0.attn.q``,
``blocks.0.attn.qkv.input``, ``blocks.0.attn.qkv.weight``, ``patch_embed.proj.input``, ``head.input``. The integer model and
the overrides of `ModelSpec` use the same names.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from qvit.quantizers.lsq import LSQQuantizer
from qvit.quantizers.pixel import PixelQuantizer
from qvit.quantizers.statsq import StatsQuantizer

_ENDING = "_quantizer"

Quantizer = LSQQuantizer | StatsQuantizer | PixelQuantizer


def quantization_points(model: nn.Module) -> dict[str, Quantizer]:
    """Name -> quantizer, in the order of the model's modules."""
    return {name.removesuffix(_ENDING): module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def float_mode(model: nn.Module) -> AbstractContextManager[None]:
    """Within it the model runs in floating point, IRM included, calibrated or not."""
    return quantizing_only(model, ())


@contextmanager
def quantizing_only(model: nn.Module, names: Container[str]) -> Iterator[None]:
    """Within it only the points of these names are quantized, all else runs in floating point, IRM included.

    q, k, v and the softmax map of a block go together: q's name decides.
    """
    points = quantization_points(model)
    before = {name: quantizer.enabled for name, quantizer in points.items()}
    for name, quantizer in points.items():
        quantizer.enabled = name in names
    try:
        yield
    finally:
        for name, quantizer in points.items():
            quantizer.enabled = before[name]


@contextmanager
def record_codes(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Within it, every forward leaves the codes of every activation point in the dict it yields: name -> int16 codes."""
    codes: dict[str, torch.Tensor] = {}

    def keep(name: str):  # type: ignore[no-untyped-def]
        def hook(_module: nn.Module, _inputs: object, output) -> None:  # type: ignore[no-untyped-def]
            codes[name] = output.codes.to(torch.int16)

        return hook

    points = {name: q for name, q in quantization_points(model).items() if not name.endswith(".weight")}
    handles = [quantizer.register_forward_hook(keep(name)) for name, quantizer in points.items()]
    try:
        yield codes
    finally:
        for handle in handles:
            handle.remove()
