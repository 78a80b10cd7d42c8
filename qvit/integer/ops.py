"""The op table: the handful of operations that an integer vision transformer consists of, and their constants.

Engines implement these operations; `qvit.engines.reference` is the readable implementation that every other is tested
against. Sums are exact integers, so engines agree bit for bit up to the float steps, which are float32.

    operation         in -> out                                           formula
    quantize          float [.., C] -> codes [.., C]                      clamp(round_half_even((x - offset) / scale), qn, qp)
    norm + quantize   float [.., C] -> codes [.., C]                      quantize(LayerNorm(x))
    linear            codes [.., K] x codes [M, K] -> int32 sums [.., M]  sum_k code_x[k] * code_w[m, k]
    (half-step W)     the same                                            the same + 1/2 sum_k code_x[k]; see `Weight`
    epilogue float    sums (+ residual) -> float [.., M]                  sums * (scale_x * scale_w[m]) + folded_bias[m]
    epilogue codes    sums -> codes [.., M]                               quantize(epilogue float)
    epilogue gelu     sums -> codes [.., M]                               quantize(GELU(epilogue float))
    epilogue rectify  sums -> codes [B, H, N, D]                          quantize(weight * standardise(epilogue float) + bias)
    attention         codes of q, k, v -> float [B, N, C]                 see `Attention`; proj's input is quantized next

Codes are round-half-to-even: that is what PyTorch's and NumPy's ``round``, C's ``nearbyint`` and CUDA's ``rintf`` do.
All arrays here are NumPy; float vectors are float32, whatever they were stored as.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qvit.integer.packing import unpack
from qvit.spec import HalfStep, PerGroup, QuantSpec


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Constants of one quantization point.

    Attributes:
        spec: bits, sign and granularities.
        scale: float32 of shape ``spec.scale_shape(dims)``, positive.
        offset: float32 of shape ``spec.offset_shape(dims)``; half the scale for a half step; ``None`` without offset.
    """

    spec: QuantSpec
    scale: np.ndarray
    offset: np.ndarray | None

    @property
    def half_step(self) -> bool:
        """Whether the offset is half the scale, so that sums are corrected with whole numbers."""
        return isinstance(self.spec.offset, HalfStep)


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight as it lies in the file: packed codes of [M, K].

    Its values are ``scale * code`` or, with a half-step offset (StatsQ), ``scale * (code + 1/2)``. A linear layer then gives

        y[m] = scale_x * scale_w[m] * (sum_k code_x[k] code_w[m, k] + 1/2 sum_k code_x[k]) + folded_bias[m]

    The bracket is half of the whole number ``2 * sums + sum_k code_x[k]`` and is rounded to float32 once, as sums without the
    half are; whether an engine adds the sum of the input's codes or multiplies by ``2 code_w + 1`` makes no difference then.

    Attributes:
        spec: bits and granularity.
        shape: (M, K).
        packed: uint8, `qvit.integer.packing`, rows not padded.
        scale: float32 [M, 1], [1] or [M, K / group].
    """

    spec: QuantSpec
    shape: tuple[int, int]
    packed: np.ndarray
    scale: np.ndarray

    @property
    def half_step(self) -> bool:
        """Whether values lie at ``scale * (code + 1/2)``."""
        return isinstance(self.spec.offset, HalfStep)

    def codes(self) -> np.ndarray:
        """int8 [M, K]."""
        return unpack(self.packed, self.shape[0] * self.shape[1], self.spec.bits, signed=True).reshape(self.shape)

    def values(self) -> np.ndarray:
        """float64 [M, K]."""
        scale = self.scale.astype(np.float64)
        if isinstance(self.spec.scale, PerGroup):
            scale = np.repeat(scale, self.spec.scale.size, axis=1)
        return (self.codes().astype(np.float64) + (0.5 if self.half_step else 0)) * scale


@dataclass(frozen=True, eq=False)
class Linear:
    """A linear layer with the quantizer of its input.

    Attributes:
        name: its path in the timm model.
        input: quantizer of its input [.., K].
        weight: [M, K].
        bias: float32 [M] or ``None``; without what the input's offset adds (`folded_bias`).
    """

    name: str
    input: Quantizer
    weight: Weight
    bias: np.ndarray | None

    def folded_bias(self) -> np.ndarray | None:
        """``bias[m] + sum_k value_w[m, k] * offset_x[k]``, float32 [M], summed in float64; ``None`` if it is zero."""
        if self.input.offset is None:
            return self.bias
        values = self.weight.values()
        folded = values @ np.broadcast_to(self.input.offset.astype(np.float64), values.shape[1:])
        return (folded if self.bias is None else folded + self.bias).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Rectify:
    """IRM: standardise over the head width, then ``weight * x + bias`` a head and channel; float32 [H, D] each."""

    weight: np.ndarray
    bias: np.ndarray
    eps: float


@dataclass(frozen=True, eq=False)
class LayerNorm:
    """LayerNorm over C: weight and bias float32 [C]."""

    weight: np.ndarray
    bias: np.ndarray
    eps: float


@dataclass(frozen=True, eq=False)
class Attention:
    """Multi-head attention on codes of q, k and v [B, H, N, D].

        scores[n, m] = factor * scale_q scale_k (sum_d code_q code_k + 1/2 sum_d code_k[m])      half-step offset of q
        codes_p      = quantize(softmax(scores))
        out[n, d]    = scale_p scale_v[d] sum_m code_p code_v + scale_p offset_v[d] sum_m code_p

    An offset of k, and the constant part of q's, add one number to a whole row of scores, which softmax cancels: engines
    leave them out. Another offset of q adds ``factor * scale_k sum_d offset_q[d] code_k[m]`` instead of the half sum.

    Attributes:
        heads, head_dim: H, D.
        factor: D^-0.5.
        rectify_q, rectify_k: IRM in front of the quantizers, or ``None``.
        q, k, v, map: quantizers.
    """

    heads: int
    head_dim: int
    factor: float
    rectify_q: Rectify | None
    rectify_k: Rectify | None
    q: Quantizer
    k: Quantizer
    v: Quantizer
    map: Quantizer


@dataclass(frozen=True, eq=False)
class Block:
    """``x + ls1 * proj(attention(qkv(norm1(x))))``, then ``x + ls2 * fc2(gelu(fc1(norm2(x))))``; x float32 [B, N, C].

    ``ls1``, ``ls2``: LayerScale float32 [C], or ``None``.
    """

    norm1: LayerNorm
    qkv: Linear
    attention: Attention
    proj: Linear
    ls1: np.ndarray | None
    norm2: LayerNorm
    fc1: Linear
    fc2: Linear
    ls2: np.ndarray | None
