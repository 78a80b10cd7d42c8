"""Where the transformer blocks of a timm model are, whatever its family."""

from __future__ import annotations

from typing import Any

from torch import nn


def transformer_blocks(model: Any) -> list[nn.Module]:
    """The blocks of a ViT, or those of all stages of a Swin Transformer, in the order in which they run; else none."""
    if hasattr(model, "blocks"):
        return list(model.blocks)
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.Module) or not all(hasattr(layer, "blocks") for layer in layers.children()):
        return []
    return [block for layer in layers.children() for block in layer.blocks]  # type: ignore[union-attr]
