"""The parts of a frozen Swin Transformer."""

from __future__ import annotations

from typing import Any

from qvit.architecture import SwinArchitecture
from qvit.integer.ops import Block, PatchMerging, Stage, Windows
from qvit.integer.reader import Reader


def swin_parts(reader: Reader, a: SwinArchitecture) -> dict[str, Any]:
    """The fields of `qvit.integer.model.IntegerModel` that hold ops, by name.

    Raises:
        FileFormatError: a tensor or spec is missing, of another shape or type, or out of range.
    """
    return {
        "patch": reader.patch(),
        "cls_token": None,
        "dist_token": None,
        "reg_token": None,
        "pos_embed": None,
        "norm_pre": reader.norm("patch_embed.norm", a.embed_dim),
        "stages": tuple(_stage(reader, a, stage) for stage in range(a.stages)),
        "norm": reader.norm("norm", a.num_features),
        "fc_norm": None,
        "heads": tuple(reader.linear(name, a.num_classes, a.num_features, True, None) for name in a.heads),
    }


def _stage(reader: Reader, a: SwinArchitecture, stage: int) -> Stage:
    merging = None
    if stage:
        name, width = f"layers.{stage}.downsample", 4 * a.width(stage - 1)
        merging = PatchMerging(
            map=a.map(stage - 1),
            norm=reader.norm(f"{name}.norm", width),
            reduction=reader.linear(f"{name}.reduction", a.width(stage), width, False, None),
        )
    return Stage(merging, tuple(_block(reader, a, stage, index) for index in range(a.depths[stage])))


def _block(reader: Reader, a: SwinArchitecture, stage: int, index: int) -> Block:
    name, c, hidden = f"layers.{stage}.blocks.{index}", a.width(stage), a.mlp_hidden[stage]
    (height, width), heads = a.windows[stage], a.num_heads[stage]
    windows = Windows(
        map=a.map(stage),
        size=a.windows[stage],
        shift=a.shift(stage, index),
        bias_table=reader.take(f"{name}.attn.relative_position_bias_table", ((2 * height - 1) * (2 * width - 1), heads)),
    )
    return Block(
        name=name,
        norm1=reader.norm(f"{name}.norm1", c),
        qkv=reader.linear(f"{name}.attn.qkv", 3 * c, c, a.qkv_bias, None),
        attention=reader.attention(f"{name}.attn", heads, a.head_dim(stage), height * width, None, windows),
        proj=reader.linear(f"{name}.attn.proj", c, c, True, None),
        ls1=None,
        norm2=reader.norm(f"{name}.norm2", c),
        fc1=reader.linear(f"{name}.mlp.fc1", hidden, c, True, None),
        fc2=reader.linear(f"{name}.mlp.fc2", c, hidden, True, None),
        ls2=None,
    )
