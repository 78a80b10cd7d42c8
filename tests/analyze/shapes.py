"""Architectures for the tests of counting: timm's models on the meta device, and what a Swin's products follow from."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from qvit.architecture import SwinArchitecture


def timm_model(name: str, **options: Any) -> Any:
    """timm's model without weights: shapes alone."""
    with torch.device("meta"):
        return timm.create_model(name, **options).eval()


def swin_shape(model: Any) -> SwinArchitecture:
    """The architecture, read off timm's modules."""
    blocks = [layer.blocks[0] for layer in model.layers]
    return SwinArchitecture(
        name=type(model).__name__,
        img_size=tuple(model.patch_embed.img_size),
        patch_size=tuple(model.patch_embed.patch_size),
        in_chans=model.in_chans,
        num_classes=model.num_classes,
        embed_dim=model.patch_embed.proj.out_channels,
        depths=tuple(len(layer.blocks) for layer in model.layers),
        num_heads=tuple(block.attn.num_heads for block in blocks),
        windows=tuple(tuple(block.window_size) for block in blocks),
        mlp_hidden=tuple(block.mlp.fc1.out_features for block in blocks),
        qkv_bias=blocks[0].attn.qkv.bias is not None,
        norm_eps=model.norm.eps,
    )


def counted(model: nn.Module, size: tuple[int, int, int]) -> dict[str, int]:
    """Name of a product -> multiplies of one image, counted where timm's modules run; nothing of qvit is used."""
    found: dict[str, int] = {}
    handles = []

    def linear(name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            found[name] = output.numel() * module.weight[0].numel()  # every output is a sum over one row of the weight

        return hook

    def attention(name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> None:
            groups, tokens, width = inputs[0].shape  # an image, or its windows
            found[f"{name}.scores"] = found[f"{name}.values"] = groups * tokens * tokens * width

        return hook

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_hook(linear(name)))
        elif type(module).__name__ in ("Attention", "WindowAttention"):
            handles.append(module.register_forward_hook(attention(name)))
    with torch.no_grad():
        model(torch.empty(1, *size, device="meta"))
    for handle in handles:
        handle.remove()
    return found
