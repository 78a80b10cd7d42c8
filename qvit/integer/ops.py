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
    windows           float [B, L, C] <-> float [B W, N, C]               see `Windows`; around attention, in Swin alone
    merge             float [B, L, C] -> float [B, L / 4, M]              see `PatchMerging`; in Swin alone
    stream            float [B, N, C] -> float [B, N, C]                  x, or half(x) with residual float16; see `Block`

Codes are round-half-to-even: that is what PyTorch's and NumPy's ``round``, C's ``nearbyint`` and CUDA's ``rintf`` do.
All arrays here are NumPy; float vectors are float32, whatever they were stored as.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qvit.integer.packing import unpack
from qvit.integer.windows import relative_index, window_mask, window_regions, window_tokens
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
        return self._folded_bias

    @cached_property
    def _folded_bias(self) -> np.ndarray | None:
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
class Windows:
    """Swin's windows around attention, which tokens of different windows do not enter together.

    The map of L tokens, row by row, is cut into W windows of N tokens; an image then counts as W sequences, so that the codes
    in attention, and those of the inputs of qkv and proj, are [B W, ..], the windows of an image one behind the other:

        windows[b W + w, n] = map[b, tokens()[w, n]]            in front of qkv (behind norm1), and back behind proj

    To the scores of `Attention` two numbers are added, each sum rounded to float32, in this order:

        scores[b W + w, h, n, m] = (scores[b W + w, h, n, m] + bias()[h, n, m]) + mask()[w, n, m]

    Attributes:
        map: (height, width) of the map in tokens; L is their product.
        size: (height, width) of a window; N is their product. It divides the map.
        shift: (down, right) in tokens; (0, 0) for windows that start at the map's corner.
        bias_table: float32 [(2 height - 1) (2 width - 1), H], the relative position bias as the file holds it.
    """

    map: tuple[int, int]
    size: tuple[int, int]
    shift: tuple[int, int]
    bias_table: np.ndarray

    @property
    def area(self) -> int:
        """N, tokens of a window."""
        return self.size[0] * self.size[1]

    @property
    def count(self) -> int:
        """W, windows of an image."""
        return self.map[0] * self.map[1] // self.area

    def tokens(self) -> np.ndarray:
        """int32 [W, N]: where in the map each token of each window lies; every token of the map occurs once."""
        return window_tokens(self.map, self.size, self.shift)

    def bias(self) -> np.ndarray:
        """float32 [H, N, N], queries n by keys m."""
        return np.ascontiguousarray(self.bias_table[relative_index(self.size)].transpose(2, 0, 1))

    def mask(self) -> np.ndarray | None:
        """float32 [W, N, N], 0 or -100; ``None`` without a shift. Blocks of equal geometry share one array."""
        return window_mask(self.map, self.size, self.shift)

    def regions(self) -> np.ndarray | None:
        """int8 [W, N]: `mask` is -100 where the numbers of two tokens differ; ``None`` without a shift."""
        return window_regions(self.map, self.size, self.shift) if any(self.shift) else None


@dataclass(frozen=True, eq=False)
class Attention:
    """Multi-head attention on codes of q, k and v [B, H, N, D].

        scores[n, m] = factor * scale_q scale_k (sum_d code_q code_k + 1/2 sum_d code_k[m])      half-step offset of q
        scores[n, m] = scores[n, m] + bias[n, m] + mask[n, m]                                    in windows (`Windows`)
        codes_p      = quantize(softmax(scores))
        out[n, d]    = scale_p scale_v[d] sum_m code_p code_v + scale_p offset_v[d] sum_m code_p

    An offset of k, and the constant part of q's, add one number to a whole row of scores, which softmax cancels: engines
    leave them out. Another offset of q adds ``factor * scale_k sum_d offset_q[d] code_k[m]`` instead of the half sum.

    Attributes:
        heads, head_dim: H, D.
        factor: D^-0.5.
        rectify_q, rectify_k: IRM in front of the quantizers, or ``None``.
        q, k, v, map: quantizers.
        windows: attention stays within them; ``None``: all tokens of an image attend to all.
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
    windows: Windows | None = None


@dataclass(frozen=True, eq=False)
class Block:
    """``x + ls1 * proj(attention(qkv(norm1(x))))``, then ``x + ls2 * fc2(gelu(fc1(norm2(x))))``; x float32 [B, N, C].

    In Swin attention and its two linear layers see windows (`Windows`), the MLP sees the map.

    In a model with ``residual`` float16 the residual stream is rounded to float16 before anything reads it:

        half(what enters the first block)        a ViT's tokens, all of them, behind norm_pre; a Swin's behind patch_embed.norm
        half(x + ls1 * proj(..)), half(x + ls2 * fc2(..))                        of every block; the sum is of float32
        half(reduction(..))                                                      of every `PatchMerging`

    ``half`` is IEEE's: to the nearest, ties to even, subnormal numbers kept, infinity from 65520 on. Nothing else is rounded:
    what norms, pooling and heads compute of the rounded stream is float32.

    Attributes:
        name: its path in the timm model, ``blocks.0`` or ``layers.0.blocks.0``.
        ls1, ls2: LayerScale float32 [C], or ``None``.
    """

    name: str

    norm1: LayerNorm
    qkv: Linear
    attention: Attention
    proj: Linear
    ls1: np.ndarray | None
    norm2: LayerNorm
    fc1: Linear
    fc2: Linear
    ls2: np.ndarray | None


@dataclass(frozen=True, eq=False)
class PatchMerging:
    """Halves the sides of a map: ``reduction(quantize(LayerNorm(neighbours)))``, float32 [B, L, C] -> [B, L / 4, M].

    The four neighbours of each 2 x 2 square are concatenated column by column, [top left, bottom left, top right, bottom
    right], 4 C features, which the norm and the linear layer read.

    Attributes:
        map: (height, width) of the map that comes in, both even.
        norm: over 4 C.
        reduction: [M, 4 C]; its input's codes are [B, height / 2, width / 2, 4 C].
    """

    map: tuple[int, int]
    norm: LayerNorm
    reduction: Linear


@dataclass(frozen=True, eq=False)
class Stage:
    """Blocks that work on one map. A ViT is one stage; a Swin Transformer has several.

    Attributes:
        merging: runs in front of the blocks; ``None`` in the first stage.
        blocks: run one after the other.
    """

    merging: PatchMerging | None
    blocks: tuple[Block, ...]
