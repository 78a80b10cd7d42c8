"""Matrix products of the training graph, computed on the codes: what is trained is what runs.

Each product multiplies whole numbers and scales the sums afterwards, with the same formulas as the integer engines, while
its gradient is that of the product of the dequantized values. In float32 the sums are exact (`exact_matmul`), so the
training graph and the reference engine agree bit for bit up to LayerNorm, softmax and GELU; under bfloat16 autocast the
codes are still exact, and only the sums are rounded.
"""

from __future__ import annotations

import torch

from qvit.quantizers.exact_matmul import exact_matmul
from qvit.quantizers.lsq import Quantized, repeat_groups
from qvit.spec import HalfStep, PerGroup, QuantSpec


def _matmul(
    a: torch.Tensor, b: torch.Tensor, spec_a: QuantSpec, spec_b: QuantSpec, largest_b: int | None = None
) -> torch.Tensor:
    """Sums [.., N, M] of codes a [.., N, K] and b [.., K, M]: exact, in float32 or float64; bfloat16 under autocast."""
    if a.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(a.device.type, enabled=False):
            return torch.matmul(a, b)
    return exact_matmul(a, b, max(-spec_a.qn, spec_a.qp), largest_b or max(-spec_b.qn, spec_b.qp))


def whole_weight(w: Quantized) -> tuple[torch.Tensor, torch.Tensor, int]:
    """A weight as whole numbers times a scale: (numbers [M, K], scale, their largest magnitude).

    Where its levels lie at odd half steps, these are ``2 c + 1`` and half the step (exact in bfloat16 as well: 8 bits), so that
    no sum of the input's codes is needed; else the codes and the step.
    """
    if isinstance(w.spec.offset, HalfStep):
        return 2 * w.codes + 1, w.scale * 0.5, 2 * w.spec.qp + 1
    return w.codes, w.scale, max(-w.spec.qn, w.spec.qp)


def folded_bias(w: Quantized, offset: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor | None:
    """``bias[m] + sum_k w[m, k] * offset[k]``, [M]: what an input offset adds to every output (method: LSQ+ on integers).

    Summed in float64, as the integer model does when it is loaded.
    """
    if offset is None:
        return bias
    codes, scale, _ = whole_weight(w)
    values = codes.double() * repeat_groups(scale.double(), w.spec)
    folded = values @ offset.double().expand(values.shape[1])
    return (folded if bias is None else folded + bias.double()).float()


def _scaled(sums: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The float epilogue: ``sums * scale + shift``."""
    y = sums.float() * scale
    return (y if shift is None else y + shift).to(dtype)


class _CodeLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_value, w_value, bias, x: Quantized, w: Quantized):  # type: ignore[override]
        ctx.save_for_backward(x_value, w_value)
        ctx.has_bias = bias is not None
        shift = folded_bias(w, x.offset, bias)
        if isinstance(x.spec.scale, PerGroup) or isinstance(w.spec.scale, PerGroup):
            y = _grouped_sums(x, w)
            return _scaled(y, y.new_ones(()), shift, x_value.dtype)
        codes, scale, largest = whole_weight(w)
        sums = _matmul(x.codes, codes.t(), x.spec, w.spec, largest)
        return _scaled(sums, x.scale * scale.flatten(), shift, x_value.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x_value, w_value = ctx.saved_tensors
        grad = grad.to(w_value.dtype)
        grad_x = grad_w = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ w_value
        rows = grad.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            grad_w = rows.t() @ x_value.flatten(0, -2)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0, dtype=torch.float32)
        return grad_x, grad_w, grad_bias, None, None


def _grouped_sums(x: Quantized, w: Quantized) -> torch.Tensor:
    """``sum over groups g of scale_x[g] * scale_w[m, g] * sums[g]``, the groups added in order in float32."""
    size = (x.spec.scale if isinstance(x.spec.scale, PerGroup) else w.spec.scale).size  # type: ignore[union-attr]
    y: torch.Tensor | None = None
    codes, scale, largest = whole_weight(w)
    for group in range(x.codes.shape[-1] // size):
        part = slice(group * size, (group + 1) * size)
        sums = _matmul(x.codes[..., part], codes[:, part].t(), x.spec, w.spec, largest).float()
        scale_x = x.scale[group] if isinstance(x.spec.scale, PerGroup) else x.scale
        scale_w = scale[:, group] if isinstance(w.spec.scale, PerGroup) else scale.flatten()
        term = sums * (scale_x * scale_w)
        y = term if y is None else y + term
    assert y is not None
    return y


def code_linear(x: Quantized, w: Quantized, bias: torch.Tensor | None) -> torch.Tensor:
    """The linear layer ``x w^T + bias`` on codes.

    Args:
        x: input [.., K].
        w: weight [M, K].
        bias: [M] or ``None``.

    Returns:
        [.., M], float32, or the autocast type if autocast is on.
    """
    return _CodeLinear.apply(x.value, w.value, bias, x, w)


def _half_step_scores(sums: torch.Tensor, k_sums: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """sums [B, H, N, N], sums of k's codes [B, H, 1, N] -> scores where q has a half-step offset."""
    return (sums.float() + 0.5 * k_sums) * scale


class _CodeScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_value, k_value, q: Quantized, k: Quantized, factor: float):  # type: ignore[override]
        ctx.save_for_backward(q_value, k_value)
        ctx.factor = factor
        sums = _matmul(q.codes, k.codes.transpose(-2, -1), q.spec, k.spec)
        scale_k = k.scale.transpose(-2, -1) if k.scale.dim() > 1 else k.scale
        scale = q.scale * factor * scale_k
        if isinstance(q.spec.offset, HalfStep):
            return _half_step_scores(sums, k.codes.sum(-1, dtype=torch.float32)[..., None, :], scale)
        column = None
        if q.offset is not None:
            column = (k.codes.double() * q.offset).sum(-1).float()[..., None, :] * (scale_k * factor)
        return _scaled(sums, scale, column, torch.float32)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        q_value, k_value = ctx.saved_tensors
        grad = (grad * ctx.factor).to(q_value.dtype)
        return grad @ k_value, grad.transpose(-2, -1) @ q_value, None, None, None


def code_scores(q: Quantized, k: Quantized, factor: float) -> torch.Tensor:
    """Attention scores ``factor * q k^T`` on codes, float32 [B, H, N, N], up to a constant a row.

    An offset of k, and the constant part of q's, add the same number to every key of a row, which softmax cancels; they are
    left out here and in every engine. q's offset adds a term a key: the sum of k's codes for a half step.

    Args:
        q, k: [B, H, N, D].
        factor: D^-0.5.
    """
    return _CodeScores.apply(q.value, k.value, q, k, factor)


class _CodeValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p_value, v_value, p: Quantized, v: Quantized):  # type: ignore[override]
        ctx.save_for_backward(p_value, v_value)
        sums = _matmul(p.codes, v.codes, p.spec, v.spec)
        if v.offset is None:
            return _scaled(sums, p.scale * v.scale, None, v_value.dtype)
        rows = p.codes.sum(-1, keepdim=True, dtype=torch.float32)
        if isinstance(v.spec.offset, HalfStep):
            return _scaled(sums.float() + 0.5 * rows, p.scale * v.scale, None, v_value.dtype)
        return _scaled(sums, p.scale * v.scale, rows * (p.scale * v.offset), v_value.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        p_value, v_value = ctx.saved_tensors
        grad = grad.to(v_value.dtype)
        return grad @ v_value.transpose(-2, -1), p_value.transpose(-2, -1) @ grad, None, None


def code_values(p: Quantized, v: Quantized) -> torch.Tensor:
    """Attention output ``p v`` on codes; v's offset is multiplied by the row sums of p's codes.

    Args:
        p: softmax map [B, H, N, N].
        v: [B, H, N, D].

    Returns:
        [B, H, N, D], float32, or the autocast type if autocast is on.
    """
    return _CodeValues.apply(p.value, v.value, p, v)
