"""timm's VisionTransformer and VisionTransformerDistilled (ViT, DeiT): description, swap and rebuilding."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Format, LayerNorm, LayerScale, Mlp, PatchDropout, PatchEmbed, activations
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from qvit.architecture import VitArchitecture
from qvit.errors import UnsupportedModelError
from qvit.families.missing import lacks
from qvit.families.swap import Swap, mlp_ratio
from qvit.layers.attention import QuantAttention
from qvit.layers.residual import HalfBlock, half_stream, round_block, round_output
from qvit.preprocessing import Preprocessing
from qvit.spec import ModelSpec

MODEL_CLASSES = (VisionTransformer, VisionTransformerDistilled)

_LAYER_SCALES = tuple({LayerScale, inspect.getmodule(Block).LayerScale})  # type: ignore[union-attr]
_NORMS = (nn.LayerNorm, LayerNorm)
_PLAIN = (nn.Sequential, nn.Identity, nn.Dropout, nn.Linear, nn.Conv2d, DropPath, PatchDropout, PatchEmbed, Mlp, Block)
_ACTIVATIONS = {
    nn.GELU: "gelu",
    activations.GELU: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.QuickGELU: "quick_gelu",
}
_ACTIVATION_LAYERS = {"gelu": nn.GELU, "gelu_tanh": partial(nn.GELU, approximate="tanh"), "quick_gelu": activations.QuickGELU}


def activation_name(module: nn.Module, name: str) -> str:
    """The name of an activation module; raises `UnsupportedModelError` where it is none of the known ones."""
    if type(module) is nn.GELU and module.approximate == "tanh":
        return "gelu_tanh"
    if type(module) not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) is not supported: qvit knows GELU, tanh-GELU and QuickGELU between fc1 and fc2."
        )
    return _ACTIVATIONS[type(module)]


def check(model: Any) -> None:
    """Raises `UnsupportedModelError`, naming the first module or option that qvit does not quantize."""
    for name, module in model.named_modules():
        known = type(module) in (*MODEL_CLASSES, *_PLAIN, *_NORMS, *_LAYER_SCALES, *_ACTIVATIONS)
        if type(module) is Attention:
            for part in ("q_norm", "k_norm", "norm"):
                inner = getattr(module, part, None)
                if inner is not None and not isinstance(inner, nn.Identity):
                    raise UnsupportedModelError(
                        f"{name}.{part} ({type(inner).__name__}) is not supported: qvit normalises q and k with IRM instead; "
                        "use a model without qk_norm and scale_norm."
                    )
            if getattr(module, "gate", None) is not None:
                raise UnsupportedModelError(f"{name}.gate is not supported: use a model without gated attention.")
        elif not known:
            raise UnsupportedModelError(
                f"{name or 'the model'} ({type(module).__name__}) is not supported: "
                f"{lacks(model) or 'qvit quantizes plain ViT and DeiT blocks (Attention, Mlp, LayerNorm, LayerScale)'}."
            )
        if type(module) in _NORMS and (module.weight is None or module.bias is None):
            raise UnsupportedModelError(f"{name} is a LayerNorm without weight and bias, which is not supported.")
        if type(module) is Mlp and not isinstance(getattr(module, "norm", None) or nn.Identity(), nn.Identity):
            raise UnsupportedModelError(f"{name}.norm is not supported: use a model without a norm between fc1 and fc2.")
    if model.global_pool not in ("token", "avg"):
        raise UnsupportedModelError(f"global_pool={model.global_pool!r} is not supported: use 'token' or 'avg'.")
    patches = model.patch_embed
    if patches.dynamic_img_pad and any(size % patch for size, patch in zip(patches.img_size, patches.patch_size, strict=True)):
        raise UnsupportedModelError(
            f"dynamic_img_pad is not supported where patches of {patches.patch_size} do not fill the image size "
            f"{patches.img_size}: create the model with an img_size that they fill."
        )
    if model.num_classes <= 0 or not isinstance(model.head, nn.Linear):
        raise UnsupportedModelError("The model has no classification head: create it with num_classes > 0.")
    if not isinstance(model.patch_embed.norm, nn.Identity):
        raise UnsupportedModelError("patch_embed.norm is not supported: use a model without a norm in the patch embedding.")
    _check_uniform(model)


def _check_uniform(model: Any) -> None:
    """Raises `UnsupportedModelError` where a layer is not what `describe` reads off the first block."""
    first = _settings(model.blocks[0])
    for index, block in enumerate(model.blocks):
        here = _settings(block)
        for name in [*here, *(set(first) - set(here))]:
            if here.get(name) != first.get(name):
                raise UnsupportedModelError(
                    f"blocks.{index}.{name} ({here.get(name)}) is not like that of block 0 ({first.get(name)}): "
                    "qvit takes models whose blocks are all alike."
                )
    attention, mlp, projection = model.blocks[0].attn, model.blocks[0].mlp, model.patch_embed.proj
    if attention.qkv.out_features != 3 * model.embed_dim:
        raise UnsupportedModelError(
            f"blocks.0.attn.qkv is not {model.embed_dim} wide for q, k and v each, which is not supported."
        )
    if len({layer.bias is None for layer in (attention.proj, mlp.fc1, mlp.fc2)}) > 1:
        raise UnsupportedModelError("blocks.0: either all of attn.proj, mlp.fc1 and mlp.fc2 have a bias or none.")
    for name, module in model.named_modules():
        if type(module) in _NORMS and module.eps != model.blocks[0].norm1.eps:
            raise UnsupportedModelError(
                f"{name} has another eps ({module.eps}) than the blocks' norms, which is not supported."
            )
    if projection.stride != projection.kernel_size or any(projection.padding) or projection.groups != 1:
        raise UnsupportedModelError(
            "patch_embed.proj is not a plain projection of patches (kernel = stride), which is not supported."
        )


def _settings(block: Any) -> dict[str, str]:
    """Name -> type and options of the modules of a block, dropout apart (its rate may rise with depth)."""
    return {
        name: f"{type(module).__name__}({module.extra_repr()})"
        for name, module in block.named_modules()
        if name and "drop" not in name
    }


def describe(model: Any) -> VitArchitecture:
    """The architecture of a checked float model."""
    block = model.blocks[0]
    config = getattr(model, "pretrained_cfg", None) or {}
    return VitArchitecture(
        name=config.get("architecture") or "vision_transformer",
        img_size=tuple(model.patch_embed.img_size),
        patch_size=tuple(model.patch_embed.patch_size),
        in_chans=model.patch_embed.proj.in_channels,
        num_classes=model.num_classes,
        embed_dim=model.embed_dim,
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
        mlp_hidden=block.mlp.fc1.out_features,
        qkv_bias=block.attn.qkv.bias is not None,
        proj_bias=block.attn.proj.bias is not None,
        patch_bias=model.patch_embed.proj.bias is not None,
        class_token=model.cls_token is not None,
        dist_token=isinstance(model, VisionTransformerDistilled),
        reg_tokens=0 if model.reg_token is None else model.reg_token.shape[1],
        pos_embed=model.pos_embed is not None,
        no_embed_class=bool(model.no_embed_class),
        pre_norm=not isinstance(model.norm_pre, nn.Identity),
        final_norm=not isinstance(model.norm, nn.Identity),
        fc_norm=not isinstance(model.fc_norm, nn.Identity),
        global_pool=model.global_pool,
        pool_include_prefix=bool(getattr(model, "pool_include_prefix", False)),
        layer_scale=not isinstance(block.ls1, nn.Identity),
        activation=activation_name(block.mlp.act, "blocks.0.mlp.act"),
        norm_eps=block.norm1.eps,
    )


def build(a: VitArchitecture) -> nn.Module:
    """A float timm model of the architecture, with random weights."""
    arguments: dict[str, Any] = {
        "img_size": a.img_size,
        "patch_size": a.patch_size,
        "in_chans": a.in_chans,
        "num_classes": a.num_classes,
        "global_pool": a.global_pool,
        "embed_dim": a.embed_dim,
        "depth": a.depth,
        "num_heads": a.num_heads,
        "mlp_ratio": mlp_ratio(a.embed_dim, a.mlp_hidden),
        "qkv_bias": a.qkv_bias,
        "proj_bias": a.proj_bias,
        "init_values": 1e-5 if a.layer_scale else None,
        "class_token": a.class_token,
        "pos_embed": "learn" if a.pos_embed else "none",
        "no_embed_class": a.no_embed_class,
        "reg_tokens": a.reg_tokens,
        "pre_norm": a.pre_norm,
        "final_norm": a.final_norm or a.fc_norm,
        "fc_norm": a.fc_norm,
        "pool_include_prefix": a.pool_include_prefix,
        "norm_layer": partial(LayerNorm, eps=a.norm_eps),
        "act_layer": _ACTIVATION_LAYERS[a.activation],
    }
    model: Any = (VisionTransformerDistilled if a.dist_token else VisionTransformer)(**arguments)
    if a.patch_bias != (model.patch_embed.proj.bias is not None):
        old = model.patch_embed.proj
        model.patch_embed.proj = nn.Conv2d(
            a.in_chans, a.embed_dim, kernel_size=a.patch_size, stride=a.patch_size, bias=a.patch_bias, device=old.weight.device
        )
    model.pretrained_cfg = {"architecture": a.name}  # where `describe` finds the name again
    return model


def stem(model: Any, images: torch.Tensor) -> torch.Tensor:
    """images [B, C, H, W] -> what enters the first block, [B, N, C]."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def stages(model: Any) -> list[tuple[Any | None, list[Any]]]:
    """A ViT is one stage: its blocks, with no patch merging (``None``) in front."""
    return [(None, list(model.blocks))]


def after_attention(block: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The residual stream [B, N, C] between attention and MLP."""
    tokens = tokens + block.ls1(block.attn(block.norm1(tokens)))
    return half_stream(tokens) if isinstance(block, HalfBlock) else tokens


def tail(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What leaves the last block, [B, N, C] -> logits [B, classes]."""
    return model.forward_head(model.norm(tokens))


def _fix_size(model: Any) -> None:
    """Takes dynamic_img_size and dynamic_img_pad away: a student has the one input size of its description."""
    model.dynamic_img_size = False
    patches = model.patch_embed
    patches.flatten, patches.output_fmt = True, Format.NCHW
    patches.strict_img_size, patches.dynamic_img_pad = True, False


def swap(model: Any, a: VitArchitecture, spec: ModelSpec, preprocessing: Preprocessing) -> None:
    """Replaces, in place, the modules of a checked float model with quantized ones that take over their parameters."""
    _fix_size(model)
    swap = Swap(spec)
    swap.patch_projection(model, preprocessing)
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        block.attn = QuantAttention(block.attn, swap.resolver(f"{name}.attn"), a.num_tokens, spec.rectify, swap.statistical)
        block.mlp = swap.mlp(block.mlp, f"{name}.mlp", a.num_tokens, a.activation)
        if spec.residual == "float16":
            round_block(block)
    if spec.residual == "float16":
        round_output(model.norm_pre)
    for head in a.heads:
        setattr(model, head, swap.linear(getattr(model, head), head, None, edge=True))
