"""The launch of attention: codes of q, k and v to codes of proj's input; ``src/attention.cu``."""

from __future__ import annotations

from typing import Any

import torch

from qvit.engines.cuda import constants as c
from qvit.engines.cuda.arguments import Launch
from qvit.engines.cuda.attention_blocks import choose_attention
from qvit.engines.cuda.device import Device
from qvit.engines.cuda.shape import Shape
from qvit.engines.cuda.windows import WindowConstants


def attention_launch(
    shape: Shape,
    gpu: Device,
    block: dict[str, Any],
    q_k_v: tuple[torch.Tensor, ...],
    maps: torch.Tensor | None,
    out: torch.Tensor,
    ldo: int,
    out_bits: bool,
    queries: int | None = None,
    alone: bool = False,
) -> Launch:
    """Attention of all heads of a block.

    Args:
        shape: the sequences.
        gpu: where it is to run.
        block: the block's constants, see `ModelConstants`.
        q_k_v: codes, uint8 [images, H, N, D] each; q [images, H, queries, D] where these are ``alone``.
        maps: uint8 [images, H, N, N] for the softmax map's codes, to look at; ``None``: they are not kept.
        out: codes of proj's input, in tiles.
        ldo: tiles of a row of ``out``.
        out_bits: whether these are planes of bits.
        queries: tokens of an image that have a row of ``out``, its first ones; all of them where it is left out.
        alone: whether q has no others.
    """
    queries = shape.tokens if queries is None else queries
    of: c.AttentionConstants = block["attention"]
    windows: WindowConstants | None = block["windows"]
    codes: c.CodeConstants = block["proj_codes"]
    found: c.ValueConstants = block["values"]
    near = found.near(shape.tokens * of.map_high)
    cut = choose_attention(shape, gpu.multiprocessors, gpu.hopper, windows is not None, queries)
    q, k, v = q_k_v
    values = {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "map": maps,
        "score_scale": of.score_scale,
        "map_scale": of.map_scale,
        "value_scale": of.value_scale,
        "value_row": of.value_row,
        "offset": codes.offset,
        "step": codes.step,
        "gain": found.gain,
        "row_gain": found.row_gain,
        "shift": found.shift,
        "pack": cut.pack,
        "near": 2 * near << (16 - found.binary_places),
        "fixed_step": float((found.high - found.low) << found.binary_places),
        "fixed_first": float(2**23 + 2 ** (found.binary_places - 1) + near),
        "bias": None if windows is None else windows.bias,
        "regions": None if windows is None else windows.regions,
        "heads": shape.heads,
        "ldo": ldo,
        "images": shape.images,
        "windows": shape.windows,
        "map_margin": c.map_margin(of.map_high, shape.tokens),
        "map_unit": of.map_unit,
        "low": codes.low,
        "high": codes.high,
    }
    defines = {
        "HEAD_DIM": shape.head_dim,
        "TOKENS": shape.tokens,
        "QUERIES": queries,
        "Q_ROWS": queries if alone else shape.tokens,
        **cut.defines(),
        "Q_HALF": int(of.q_half),
        "Q_DOUBLED": int(block["heads"].doubled),
        "V_SIGNED": int(of.v_signed),
        "V_OFFSET": of.value_offset,
        "MAP_HIGH": of.map_high,
        "ROW_CHECK": int(of.row_check and windows is None),
        "FIXED": found.binary_places,
        "OUT_LOW": found.low,
        "SHOW": int(maps is not None),
        "PACKED": int(gpu.hopper and of.map_short),
        "BIAS": int(windows is not None),
        "MASK": int(windows is not None and windows.regions is not None),
        "OUT_BITS": int(out_bits),
    }
    return Launch("attention", defines, cut.grid, 32 * cut.warps, cut.shared, values)
