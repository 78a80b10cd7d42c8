"""The parts of a frozen ViT."""

from __future__ import annotations

from typing import Any

from qvit.architecture import VitArchitecture
from qvit.integer.ops import Block, Stage
from qvit.integer.reader import Reader


def vit_parts(reader: Reader, a: VitArchitecture) -> dict[str, Any]:
    """The fields of `qvit.integer.model.IntegerModel` that hold ops, by name.

    Raises:
        FileFormatError: a tensor or spec is missing, of another shape or type, or out of range.
    """
    c = a.embed_dim
    embedded = a.num_patches if a.no_embed_class else a.num_tokens
    return {
        "patch": reader.patch(),
        "cls_token": reader.take("cls_token", (1, 1, c)) if a.class_token else None,
        "dist_token": reader.take("dist_token", (1, 1, c)) if a.dist_token else None,
        "reg_token": reader.take("reg_token", (1, a.reg_tokens, c)) if a.reg_tokens else None,
        "pos_embed": reader.take("pos_embed", (1, embedded, c)) if a.pos_embed else None,
        "norm_pre": reader.norm("norm_pre", c) if a.pre_norm else None,
        "stages": (Stage(None, tuple(_block(reader, a, index) for index in range(a.depth))),),
        "norm": reader.norm("norm", c) if a.final_norm else None,
        "fc_norm": reader.norm("fc_norm", c) if a.fc_norm else None,
        "heads": tuple(reader.linear(name, a.num_classes, c, True, None) for name in a.heads),
    }


def _block(reader: Reader, a: VitArchitecture, index: int) -> Block:
    name, c, hidden, tokens = f"blocks.{index}", a.embed_dim, a.mlp_hidden, a.num_tokens
    return Block(
        name=name,
        norm1=reader.norm(f"{name}.norm1", c),
        qkv=reader.linear(f"{name}.attn.qkv", 3 * c, c, a.qkv_bias, tokens),
        attention=reader.attention(f"{name}.attn", a.num_heads, a.head_dim, tokens, tokens),
        proj=reader.linear(f"{name}.attn.proj", c, c, a.proj_bias, tokens),
        ls1=reader.take(f"{name}.ls1.gamma", (c,)) if a.layer_scale else None,
        norm2=reader.norm(f"{name}.norm2", c),
        fc1=reader.linear(f"{name}.mlp.fc1", hidden, c, a.proj_bias, tokens),
        fc2=reader.linear(f"{name}.mlp.fc2", c, hidden, a.proj_bias, tokens),
        ls2=reader.take(f"{name}.ls2.gamma", (c,)) if a.layer_scale else None,
    )
