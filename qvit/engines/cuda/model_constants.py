"""All constants of a model on the device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from qvit.architecture import VitArchitecture
from qvit.engines.cuda import constants as c
from qvit.engines.cuda.windows import WindowConstants
from qvit.engines.tables import embedding
from qvit.integer import ops
from qvit.integer.model import IntegerModel

_THREADS = 4  # of blocks; NumPy gives the interpreter back while it computes


@dataclass(frozen=True, eq=False)
class ModelConstants:
    """All constants of a model on the device, layer by layer as in `IntegerModel`."""

    pixels: c.PixelConstants
    patch: c.LinearConstants
    embed: torch.Tensor | None  # of a ViT: float32 [N, C], prefix tokens as they enter, then what is added to each patch
    norm_pre: c.NormConstants | None
    blocks: tuple[dict[str, Any], ...]
    merging: tuple[tuple[c.NormConstants, c.LinearConstants] | None, ...]  # in front of each stage of a Swin
    norm: c.NormConstants | None
    heads: tuple[tuple[c.NormConstants | c.CodeConstants, c.LinearConstants], ...]
    pooled_norm: c.NormConstants | None  # floats, where another norm follows

    @classmethod
    def of(cls, model: IntegerModel, device: torch.device) -> ModelConstants:
        """Moves a model's constants to a device."""
        to, a = c.Constants(device), model.architecture
        vit = a if isinstance(a, VitArchitecture) else None
        with ThreadPoolExecutor(_THREADS) as pool:
            blocks = tuple(pool.map(partial(_block, activation=a.activation, to=to), model.blocks))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # these threads have a stream of their own
        merging: list[tuple[c.NormConstants, c.LinearConstants] | None] = []
        for stage in model.stages:
            part = stage.merging
            if part is None:
                merging.append(None)
            else:
                norm = c.NormConstants.of(part.norm, part.reduction.input, to)
                merging.append((norm, c.LinearConstants.of(part.reduction, to)))
        averaged = vit is None or (vit.global_pool == "avg" and not vit.dist_token)
        last = model.fc_norm if averaged else model.fc_norm or model.norm
        between = model.norm if not averaged and model.fc_norm is not None else None
        heads = []
        for head in model.heads:
            codes: Any = c.CodeConstants.of(head.input, head.weight.shape[1], to)
            norm = codes if last is None else c.NormConstants.of(last, head.input, to)
            heads.append((norm, c.LinearConstants.of(head, to)))
        return cls(
            pixels=c.PixelConstants.of(model, to),
            patch=c.LinearConstants.of(model.patch, to),
            embed=None if vit is None else to.array(embedding(model)),
            norm_pre=None if model.norm_pre is None else c.NormConstants.of(model.norm_pre, None, to),
            blocks=blocks,
            merging=tuple(merging),
            norm=None if model.norm is None or not averaged else c.NormConstants.of(model.norm, None, to),
            heads=tuple(heads),
            pooled_norm=None if between is None else c.NormConstants.of(between, None, to),
        )


def _block(block: ops.Block, activation: str, to: c.Constants) -> dict[str, Any]:
    width, hidden, windows = block.fc2.weight.shape[0], block.fc2.weight.shape[1], block.attention.windows
    return {
        "windows": None if windows is None else WindowConstants.of(windows, to),
        "norm1": c.NormConstants.of(block.norm1, block.qkv.input, to),
        "qkv": c.LinearConstants.of(block.qkv, to, behind_norm=True),
        "heads": c.HeadConstants.of(block.attention, block.qkv, to),
        "attention": c.AttentionConstants.of(block.attention, to),
        "values": c.ValueConstants.of(block.attention, block.proj.input, to),
        "proj_codes": c.CodeConstants.of(block.proj.input, width, to),
        "proj": c.LinearConstants.of(block.proj, to),
        "ls1": None if block.ls1 is None else to.floats(block.ls1, width),
        "norm2": c.NormConstants.of(block.norm2, block.fc1.input, to),
        "fc1": c.LinearConstants.of(block.fc1, to, behind_norm=True),
        "fc2_codes": c.CodeConstants.of(block.fc2.input, hidden, to),
        "fc2_margin": c.activation_margin(block.fc2.input),
        "activation": c.ActivationConstants.of(block.fc1, block.fc2.input, activation, to),
        "fc2": c.LinearConstants.of(block.fc2, to),
        "ls2": None if block.ls2 is None else to.floats(block.ls2, width),
    }
