"""timm's SwinTransformer: description, swap and rebuilding."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm, Mlp, PatchEmbed, SelectAdaptivePool2d, activations
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import nn

from qvit.architecture import SwinArchitecture
from qvit.errors import UnsupportedModelError
from qvit.families.swap import Swap, mlp_ratio
from qvit.layers.exact import MapAverage
from qvit.layers.residual import HalfSwinBlock, half_stream, round_block, round_output
from qvit.layers.window_attention import QuantWindowAttention
from qvit.preprocessing import Preprocessing
from qvit.spec import ModelSpec

MODEL_CLASSES = (SwinTransformer,)

_V2 = (
    "it has cosine attention, a position bias computed by a network and norms behind attention and MLP, none of which qvit "
    "quantizes; use a swin_* model."
)
# Model class -> why it is not taken.
REFUSED = {SwinTransformerV2: _V2, SwinTransformerV2Cr: _V2}

_NO_TOKENS = "in a Swin Transformer, whose tokens have one place in a map and another in a window: use per_tensor or per_head"

_NORMS = (nn.LayerNorm, LayerNorm)
_CONTAINERS = (nn.Sequential, nn.Identity, nn.Dropout, nn.Linear, nn.Conv2d, nn.Softmax, DropPath, Mlp)
_PARTS = (PatchEmbed, PatchMerging, SwinTransformerBlock, SwinTransformerStage, WindowAttention, ClassifierHead)
_GELUS = (nn.GELU, activations.GELU)


def check(model: Any) -> None:
    """Raises `UnsupportedModelError`, naming the first module, size or option that qvit does not quantize."""
    for name, module in model.named_modules():
        if name == "head.global_pool" or name.startswith("head.global_pool."):
            continue  # checked below
        if type(module) not in (*MODEL_CLASSES, *_CONTAINERS, *_PARTS, *_NORMS, *_GELUS):
            raise UnsupportedModelError(
                f"{name or 'the model'} ({type(module).__name__}) is not supported: qvit quantizes plain Swin blocks "
                "(WindowAttention, Mlp, LayerNorm, PatchMerging)."
            )
        if type(module) is nn.GELU and module.approximate != "none":
            raise UnsupportedModelError(f"{name} (tanh-GELU) is not supported: Swin's MLP has a plain GELU.")
        if type(module) in _NORMS:
            if module.weight is None or module.bias is None:
                raise UnsupportedModelError(f"{name} is a LayerNorm without weight and bias, which is not supported.")
            if module.eps != model.norm.eps:
                raise UnsupportedModelError(
                    f"{name} has another eps ({module.eps}) than the last norm ({model.norm.eps}), which is not supported."
                )
    if empty := [stage for stage, layer in enumerate(model.layers) if not len(layer.blocks)]:
        raise UnsupportedModelError(f"layers.{empty[0]} has no blocks, which is not supported: use depths of 1 or more.")
    if not isinstance(model.head.fc, nn.Linear) or model.num_classes <= 0:
        raise UnsupportedModelError("The model has no classification head: create it with num_classes > 0.")
    if type(model.head.global_pool) is not SelectAdaptivePool2d or model.global_pool != "avg":
        raise UnsupportedModelError(f"global_pool={model.global_pool!r} is not supported: use 'avg'.")
    if getattr(model, "dynamic_img_size", False) or model.patch_embed.dynamic_img_pad:  # timm 1.0.29 lacks the first
        raise UnsupportedModelError("dynamic_img_size is not supported: integer models have one input size.")
    projection = model.patch_embed.proj
    if projection.stride != projection.kernel_size or any(projection.padding) or projection.groups != 1:
        raise UnsupportedModelError(
            "patch_embed.proj is not a plain projection of patches (kernel = stride), which is not supported."
        )
    if not isinstance(model.patch_embed.norm, _NORMS):
        raise UnsupportedModelError("patch_embed.norm is missing: use a model with a norm behind the patch embedding.")
    _check_sizes(model)
    _check_like(model)


def _check_sizes(model: Any) -> None:
    """Raises `UnsupportedModelError` where timm would pad a map, which the integer model does not."""
    rows, columns = model.patch_embed.grid_size
    for stage, layer in enumerate(model.layers):
        if stage and (rows % 2 or columns % 2):
            raise UnsupportedModelError(
                f"layers.{stage}.downsample halves a map of {rows} x {columns} tokens, whose sides are not even; "
                f"{_fitting(model)}."
            )
        rows, columns = (rows // 2, columns // 2) if stage else (rows, columns)
        height, width = layer.blocks[0].window_size
        if not rows or not columns or rows % height or columns % width:
            raise UnsupportedModelError(
                f"layers.{stage} has a map of {rows} x {columns} tokens, which windows of {height} x {width} do not divide; "
                f"{_fitting(model)}."
            )


def _fitting(model: Any) -> str:
    """Which image sizes fit the windows that the model was made with."""
    windows = getattr(model, "_ref_window_sizes", None) or [layer.blocks[0].window_size for layer in model.layers]
    fits = [
        math.lcm(*(model.patch_embed.patch_size[axis] * 2**stage * window[axis] for stage, window in enumerate(windows)))
        for axis in (0, 1)
    ]
    return f"use an image height that is a multiple of {fits[0]} and a width that is a multiple of {fits[1]}, or other windows"


def _check_like(model: Any) -> None:
    """Raises `UnsupportedModelError` where a module is not what `build` makes of `describe`'s answer."""
    described = describe(model)
    try:
        with torch.device("meta"):  # shapes alone
            expected: Any = dict(build(described).named_modules())
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(f"The model's sizes are not those of a Swin Transformer ({error}).") from None
    actual = dict(model.named_modules())
    for name, module in actual.items():
        like = expected.get(name)
        if isinstance(module, (nn.Identity, nn.Dropout, DropPath)) and isinstance(like, (nn.Identity, nn.Dropout, DropPath)):
            continue
        if like is None or _settings(module) != _settings(like):
            raise UnsupportedModelError(
                f"{name or 'the model'} ({_settings(module)}) is not what a Swin Transformer has there "
                f"({'nothing' if like is None else _settings(like)}), which is not supported."
            )
    if missing := [name for name in expected if name not in actual]:
        raise UnsupportedModelError(f"{missing[0]} is missing, which is not supported.")
    for stage, layer in enumerate(model.layers):
        for index, block in enumerate(layer.blocks):
            if tuple(block.shift_size) != described.shift(stage, index):
                raise UnsupportedModelError(
                    f"layers.{stage}.blocks.{index} shifts its windows by {tuple(block.shift_size)} where Swin shifts by "
                    f"{described.shift(stage, index)}: use a model without always_partition."
                )


def _settings(module: Any) -> str:
    """Kind and shape of a module, whatever of timm's and PyTorch's variants it is."""
    if isinstance(module, _NORMS):
        return f"LayerNorm {module.normalized_shape[0]}"
    if isinstance(module, _GELUS):
        return "GELU"
    if isinstance(module, nn.Linear):
        return f"Linear {module.out_features} x {module.in_features}, bias {module.bias is not None}"
    if isinstance(module, nn.Conv2d):
        return f"Conv2d {list(module.weight.shape)}, bias {module.bias is not None}"
    if isinstance(module, WindowAttention):
        return f"WindowAttention of {module.num_heads} heads in windows of {tuple(module.window_size)}"
    return type(module).__name__


def describe(model: Any) -> SwinArchitecture:
    """The architecture of a checked float model."""
    config = getattr(model, "pretrained_cfg", None) or {}
    first = [layer.blocks[0] for layer in model.layers]
    return SwinArchitecture(
        name=config.get("architecture") or "swin_transformer",
        img_size=tuple(model.patch_embed.img_size),
        patch_size=tuple(model.patch_embed.patch_size),
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        embed_dim=model.patch_embed.proj.out_channels,
        depths=tuple(len(layer.blocks) for layer in model.layers),
        num_heads=tuple(block.attn.num_heads for block in first),
        windows=tuple(tuple(block.window_size) for block in first),
        mlp_hidden=tuple(block.mlp.fc1.out_features for block in first),
        qkv_bias=first[0].attn.qkv.bias is not None,
        norm_eps=model.norm.eps,
    )


def build(a: SwinArchitecture) -> nn.Module:
    """A float timm model of the architecture, with random weights."""
    try:
        model: Any = _model(a, a.windows)
    except TypeError:  # timm 1.0.29 takes one window for all stages, and clips it where a map is smaller
        model = _model(a, a.windows[0])
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = a.norm_eps
    model.pretrained_cfg = {"architecture": a.name}  # where `describe` finds the name again
    return model


def _model(a: SwinArchitecture, windows: Any) -> SwinTransformer:
    return SwinTransformer(
        img_size=a.img_size,  # type: ignore[arg-type]
        patch_size=a.patch_size,  # type: ignore[arg-type]
        in_chans=a.in_chans,
        num_classes=a.num_classes,
        embed_dim=a.embed_dim,
        depths=a.depths,
        num_heads=a.num_heads,
        window_size=windows,
        mlp_ratio=tuple(mlp_ratio(a.width(stage), hidden) for stage, hidden in enumerate(a.mlp_hidden)),  # type: ignore[arg-type]
        qkv_bias=a.qkv_bias,
        drop_path_rate=0.0,
    )


def stages(model: Any) -> list[tuple[Any | None, list[Any]]]:
    """(patch merging or ``None``, blocks) of each stage."""
    return [(None if isinstance(s.downsample, nn.Identity) else s.downsample, list(s.blocks)) for s in model.layers]


def stem(model: Any, images: torch.Tensor) -> torch.Tensor:
    """images [B, C, H, W] -> what enters the first block, [B, rows, columns, C]."""
    return model.patch_embed(images)


def after_attention(block: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The residual stream [B, rows, columns, C] between attention and MLP."""
    tokens = tokens + block._attn(block.norm1(tokens))
    return half_stream(tokens) if isinstance(block, HalfSwinBlock) else tokens


def tail(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What leaves the last block, [B, rows, columns, C] -> logits [B, classes]."""
    return model.forward_head(model.norm(tokens))


def swap(model: Any, a: SwinArchitecture, spec: ModelSpec, preprocessing: Preprocessing) -> None:
    """Replaces, in place, the modules of a checked float model with quantized ones that take over their parameters."""
    swap = Swap(spec, token_scales=False, why_not=_NO_TOKENS)
    swap.patch_projection(model, preprocessing)
    for stage, layer in enumerate(model.layers):
        if stage:
            name = f"layers.{stage}.downsample.reduction"
            layer.downsample.reduction = swap.linear(layer.downsample.reduction, name, None)
            if spec.residual == "float16":
                round_output(layer.downsample)
        for index, block in enumerate(layer.blocks):
            name = f"layers.{stage}.blocks.{index}"
            block.attn = QuantWindowAttention(block.attn, swap.resolver(f"{name}.attn"), spec.rectify, swap.statistical)
            block.mlp = swap.mlp(block.mlp, f"{name}.mlp", None, a.activation)
            if spec.residual == "float16":
                round_block(block)
    if spec.residual == "float16":
        round_output(model.patch_embed)
    model.head.global_pool = MapAverage()
    model.head.fc = swap.linear(model.head.fc, "head.fc", None, edge=True)
