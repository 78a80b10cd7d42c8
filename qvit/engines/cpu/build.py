"""Hands an `IntegerModel` to the compiled engine, layer by layer, so that nothing of a model's size is unpacked in Python."""

from __future__ import annotations

from typing import Any

import numpy as np

from qvit.architecture import VitArchitecture
from qvit.engines.tables import embedding, pixel_codes
from qvit.errors import UnsupportedModelError
from qvit.integer import ops
from qvit.integer.model import IntegerModel
from qvit.spec import HalfStep, PerGroup, PerToken, QuantSpec

_ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
_F32 = np.float32
_MOST_TOKENS = 1 << 16
_ULPS = 1e-6  # relative error that the float32 steps stay below


def _shape(model: IntegerModel) -> dict[str, int]:
    """What concerns the model as a whole."""
    a = model.architecture
    vit = a if isinstance(a, VitArchitecture) else None
    return {
        "prefix": 0 if vit is None else vit.num_prefix_tokens,
        "classes": a.num_classes,
        "channels": a.in_chans,
        "height": a.img_size[0],
        "width": a.img_size[1],
        "patch_height": a.patch_size[0],
        "patch_width": a.patch_size[1],
        "activation": _ACTIVATIONS.index(a.activation),
        "average": int(vit is None or vit.global_pool == "avg"),
        "average_all": int(vit is None or vit.pool_include_prefix),
        "distilled": int(vit is not None and vit.dist_token),
        "windowed": int(vit is None),
        "half": int(model.residual == "float16"),
    }


def _stages(model: IntegerModel) -> list[dict[str, int]]:
    """Sizes of each stage. A ViT's tokens are one window of one row."""
    sizes = []
    for stage in model.stages:
        block = stage.blocks[0]
        windows, tokens = block.attention.windows, model.architecture.num_tokens
        height, width = (1, tokens) if windows is None else windows.map
        window_height, window_width = (1, tokens) if windows is None else windows.size
        sizes.append(
            {
                "map_height": height,
                "map_width": width,
                "window_height": window_height,
                "window_width": window_width,
                "dim": block.proj.weight.shape[0],
                "depth": len(stage.blocks),
                "heads": block.attention.heads,
                "hidden": block.fc1.weight.shape[0],
            }
        )
    return sizes


def build(kind: Any, isa: str, model: IntegerModel) -> Any:
    """The compiled module's builder (``kind``) with every part of the model in it.

    Raises:
        UnsupportedModelError: a head is wider than 512 channels, or there are more than 65,536 tokens.
    """
    widest = max(block.attention.head_dim for block in model.blocks)
    if widest > 512:
        raise UnsupportedModelError(f"Heads of {widest} channels are too wide for the CPU engine: use engine='reference'.")
    tokens = model.architecture.num_tokens
    if tokens > _MOST_TOKENS:
        raise UnsupportedModelError(
            f"The model has {tokens} tokens, more than the CPU engine's {_MOST_TOKENS}: use a smaller image size or "
            "larger patches."
        )
    b = kind(isa, _shape(model), _stages(model))
    _pixels(b, model)
    _linear(b, "patch", 0, model.patch)
    if isinstance(model.architecture, VitArchitecture):
        b.set_embed(embedding(model))
    for name in ("norm_pre", "norm", "fc_norm"):
        norm = getattr(model, name)
        if norm is not None:
            b.set_norm(name, 0, norm.weight, norm.bias, norm.eps, None, None, 0.0)
    for i, stage in enumerate(model.stages):
        if stage.merging is not None:
            _linear(b, "merge", i, stage.merging.reduction)
            _norm_codes(b, "merge", i, stage.merging.norm, stage.merging.reduction.input)
    for i, block in enumerate(model.blocks):
        _linear(b, "qkv", i, block.qkv)
        _linear(b, "proj", i, block.proj)
        _linear(b, "fc1", i, block.fc1)
        _linear(b, "fc2", i, block.fc2)
        _norm_codes(b, "norm1", i, block.norm1, block.qkv.input)
        _norm_codes(b, "norm2", i, block.norm2, block.fc1.input)
        _gelu(b, i, block.fc2.input)
        for which, gamma in ((1, block.ls1), (2, block.ls2)):
            if gamma is not None:
                b.set_layer_scale(i, which, gamma)
        windows = block.attention.windows
        if windows is not None:
            b.set_windows(i, *windows.shift, windows.bias_table)
        _attention(b, i, block.attention, tokens if windows is None else windows.area)
    for i, head in enumerate(model.heads):
        _linear(b, "output", i, head)
    return b


def tap_shapes(model: IntegerModel, batch: int) -> dict[str, tuple[int, ...]]:
    """Activation point -> shape of its codes, in the order in which the compiled engine takes them."""
    a = model.architecture
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.input": (batch, a.num_patches, a.patch_features)}
    for stage in model.stages:
        if stage.merging is not None:
            height, width = stage.merging.map
            layer = stage.merging.reduction
            shapes[f"{layer.name}.input"] = (batch, height // 2, width // 2, layer.weight.shape[1])
        for block in stage.blocks:
            windows, c = block.attention.windows, block.proj.weight.shape[0]
            count, n = (1, a.num_tokens) if windows is None else (windows.count, windows.area)
            heads, name = block.attention.heads, block.name
            shapes[f"{name}.attn.qkv.input"] = (batch * count, n, c)
            width = block.attention.head_dim
            shapes.update({f"{name}.attn.{part}": (batch * count, heads, n, width) for part in ("q", "k", "v")})
            shapes[f"{name}.attn.map"] = (batch * count, heads, n, n)
            shapes[f"{name}.attn.proj.input"] = (batch * count, n, c)
            shapes[f"{name}.mlp.fc1.input"] = (batch, count * n, c)
            shapes[f"{name}.mlp.fc2.input"] = (batch, count * n, block.fc1.weight.shape[0])
    shapes.update({f"{head.name}.input": (batch, head.weight.shape[1]) for head in model.heads})
    return shapes


def _array(values: Any, shape: tuple[int, ...], dtype: Any = _F32) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(values, shape), dtype=dtype)


def _per_channel(quantizer: ops.Quantizer, channels: int) -> np.ndarray:
    """The scale of a linear input, one value a channel; ones where each token has its own."""
    if isinstance(quantizer.spec.scale, PerToken):
        return np.ones(channels, _F32)
    if isinstance(quantizer.spec.scale, PerGroup):
        return np.repeat(quantizer.scale, quantizer.spec.scale.size)
    return _array(quantizer.scale, (channels,))


def _linear(b: Any, which: str, index: int, layer: ops.Linear) -> None:
    m, k = layer.weight.shape
    x, w = layer.input.spec, layer.weight.spec
    size = next((spec.scale.size for spec in (w, x) if isinstance(spec.scale, PerGroup)), k)
    groups = k // size
    # [groups, M], the products rounded to float32 as the reference engine rounds them.
    scale_w = layer.weight.scale.T if isinstance(w.scale, PerGroup) else layer.weight.scale.reshape(1, -1)
    per_token = isinstance(x.scale, PerToken)
    scale_x = _F32(1) if per_token else layer.input.scale.reshape(-1, 1)
    b.set_linear(
        which,
        index,
        w.bits,
        layer.weight.packed,
        _array(scale_w * scale_x, (groups, m)),
        _array(scale_w, (groups, m), np.float64),
        isinstance(w.offset, HalfStep),
        layer.bias,
        x.bits,
        x.qn,
        x.qp,
        _per_channel(layer.input, k),
        None if layer.input.offset is None else _array(layer.input.offset, (k,)),
        np.ascontiguousarray(layer.input.scale.reshape(-1)) if per_token else None,
    )


def _margin(spec: QuantSpec, gain: np.ndarray, shift: np.ndarray, row_scale: np.ndarray | None) -> float:
    """How near to the boundary between two codes a float32 result is computed again in float64: its error stays below.

    Half a step and more, where steps are tiny beside the values: always. Kernels make it wider by ``margin / 4 * |mean| /
    deviation`` (`row_margin` in `src/ops/quantize.h`), for the mean of the row meets the gain. It has half a rounding (2^-24)
    for each value that a lane adds up, as sums are half as large as the last on average, and eight more; four vectors of at
    least four lanes share out a row.

    Args:
        spec: of the codes.
        gain, shift: of standardised values to codes; the last dimension is that of a row.
        row_scale: the scales of tokens, where they have their own.
    """
    least = 1.0 if row_scale is None else float(row_scale.min())
    reach = max(spec.qp, -spec.qn) + 1 + float(np.abs(shift).max()) / least
    of_mean = 2.0**-24 * (8 + gain.shape[-1] / 32) * float(np.abs(gain).max()) / least
    return min(max(_ULPS * reach, 4 * of_mean), 1.0)


def _norm_codes(b: Any, which: str, index: int, norm: ops.LayerNorm, quantizer: ops.Quantizer) -> None:
    """LayerNorm's affine part and the division by the step are one multiplication and one addition."""
    scale = _per_channel(quantizer, len(norm.weight)).astype(np.float64)
    offset = 0.0 if quantizer.offset is None else quantizer.offset.astype(np.float64)
    gain = (norm.weight / scale).astype(_F32)
    shift = ((norm.bias - offset) / scale).astype(_F32)
    margin = _margin(quantizer.spec, gain, shift, quantizer.scale if isinstance(quantizer.spec.scale, PerToken) else None)
    b.set_norm(which, index, norm.weight, norm.bias, norm.eps, gain, shift, margin)


def _gelu(b: Any, index: int, quantizer: ops.Quantizer) -> None:
    b.set_gelu(index, min(_ULPS * (quantizer.spec.qp - quantizer.spec.qn + 1) + 3e-7 / float(quantizer.scale.min()), 1.0))


def _attention(b: Any, index: int, attention: ops.Attention, tokens: int) -> None:
    heads, dim = attention.heads, attention.head_dim
    hn, hd = (heads, tokens), (heads, dim)
    q, k, v, p = attention.q, attention.k, attention.v, attention.map
    # Stored codes: q unsigned; k and v signed bytes.
    k_bias, v_bias = (0 if s.spec.signed else 1 << (s.spec.bits - 1) for s in (k, v))
    for which, quantizer, rectify, stored in (
        (0, q, attention.rectify_q, -q.spec.qn),
        (1, k, attention.rectify_k, -k_bias),
        (2, v, None, -v_bias),
    ):
        _head_codes(b, index, which, quantizer, rectify, stored, heads, dim, tokens)
    doubled = q.half_step
    twice = 2 if doubled else 1
    # sum q k = sum stored_q stored_k + qn sum k + k_bias sum stored_q; twice that, plus sum k, for a half step of q. The last
    # term is one number a row: softmax cancels it unless k has a scale per token.
    k_per_token = isinstance(k.spec.scale, PerToken)
    largest_q, largest_k = (max(s.qp, -s.qn) for s in (q.spec, k.spec))
    numbers = {
        # The largest magnitude of a score's whole number, with or without that term.
        "most_sum": dim * ((twice * largest_q + int(doubled)) * largest_k + twice * k_bias * (q.spec.qp - q.spec.qn)),
        "wide_q": int(q.spec.bits == 8),
        "wide_p": int(p.spec.bits == 8),
        "doubled": int(doubled),
        "k_sum_factor": twice * q.spec.qn + int(doubled),
        "k_code_bias": k_bias,
        "row_bias": twice * k_bias,
        "k_uniform": int(not k_per_token),
        "p_high": p.spec.qp,
        "v_mul": 2 if v.half_step else 1,
        "v_row": 2 * v_bias + 1 if v.half_step else v_bias,
    }
    q_scale = q.scale * _F32(attention.factor) * _F32(0.5 if doubled else 1.0)
    v_scale = v.scale * _F32(0.5 if v.half_step else 1.0)
    learned_q = q.offset if q.spec.learns_offset else None
    learned_v = v.offset if v.spec.learns_offset else None
    b.set_attention(
        index,
        numbers,
        attention.factor,
        1.5 * _ULPS * (p.spec.qp + 1),
        _by_token(q_scale, hn),
        _by_token(k.scale, hn),
        None if learned_q is None else _array(learned_q.reshape(-1, learned_q.shape[-1]), hd),
        _by_token(p.scale, hn),
        _by_channel(v_scale, hd),
        None if learned_v is None else _by_channel(learned_v, hd),
    )


def _by_token(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[1], [H, 1, 1] or [H, N, 1] -> [H, N]."""
    return _array(values if values.ndim == 1 else values[:, :, 0], shape)


def _by_channel(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[1], [H, 1, 1] or [H, 1, D] -> [H, D]."""
    return _array(values if values.ndim == 1 else values[:, 0, :], shape)


def _head_codes(
    b: Any,
    index: int,
    which: int,
    quantizer: ops.Quantizer,
    rectify: ops.Rectify | None,
    stored_bias: int,
    heads: int,
    dim: int,
    tokens: int,
) -> None:
    spec, shape = quantizer.spec, (heads, dim)
    row_scale = None
    if isinstance(spec.scale, PerToken):
        row_scale = _by_token(quantizer.scale, (heads, tokens))
        scale = np.ones(shape, _F32)
        offset = np.zeros(shape, _F32) if quantizer.half_step else _offset(quantizer, shape)
    else:
        scale, offset = _by_channel(quantizer.scale, shape), _offset(quantizer, shape)
    if rectify is None:
        weight, bias, eps = np.ones(shape, _F32), np.zeros(shape, _F32), 0.0
        gain = (1 / scale).astype(_F32)
    else:
        weight, bias, eps = rectify.weight, rectify.bias, rectify.eps
        gain = (weight / scale.astype(np.float64)).astype(_F32)
    shift = ((bias - offset.astype(np.float64)) / scale).astype(_F32)
    b.set_heads(
        index,
        which,
        rectify is not None,
        eps,
        spec.qn,
        spec.qp,
        row_scale is not None and quantizer.half_step,
        stored_bias,
        _margin(spec, gain, shift, row_scale),
        [gain, shift, weight, bias, offset, scale],
        row_scale,
    )


def _offset(quantizer: ops.Quantizer, shape: tuple[int, int]) -> np.ndarray:
    return np.zeros(shape, _F32) if quantizer.offset is None else _by_channel(quantizer.offset, shape)


def _pixels(b: Any, model: IntegerModel) -> None:
    patch, preprocessing = model.patch.input, model.preprocessing
    assert patch.offset is not None
    channels = model.architecture.in_chans
    std = np.asarray(preprocessing.std, _F32)
    offset = patch.offset.reshape(channels, -1)[:, 0]
    b.set_pixels(std, np.ascontiguousarray(offset), float(patch.scale[0]), pixel_codes(model))
