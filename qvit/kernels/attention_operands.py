"""Device functions that read what attention's kernels read: codes of q, k and v of one head, and its output's gradient.

Codes are [B, N, 3 H D]: q of all heads, then k, then v; ``columns`` is that of `qvit.kernels.rectify_quantize`.
"""

import triton
import triton.language as tl


@triton.jit
def load_codes(codes_ptr, image, tokens, heads, head, part, n, D: tl.constexpr, DP: tl.constexpr):
    """Codes [T, DP] of tokens ``n`` of one head of part 0, 1, 2 (q, k, v); zero beyond the last token and channel."""
    d = tl.arange(0, DP)
    first = codes_ptr + image.to(tl.int64) * tokens * (3 * heads * D) + (part * heads + head) * D
    where = n[:, None] * (3 * heads * D) + d[None, :]
    return tl.load(first + where, mask=(n < tokens)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_queries(codes_ptr, columns_ptr, image, tokens, heads, head, n, D: tl.constexpr, DP: tl.constexpr):
    """q over its scale: codes plus offset / scale, which is exact for half a step."""
    d = tl.arange(0, DP)
    code = load_codes(codes_ptr, image, tokens, heads, head, 0, n, D, DP)
    scale = tl.load(columns_ptr + head * D + d, mask=d < D, other=1.0)
    offset = tl.load(columns_ptr + 3 * heads * D + head * D + d, mask=d < D, other=0.0)
    return (code.to(tl.float32) + (offset / scale)[None, :]).to(code.dtype)


@triton.jit
def load_values(codes_ptr, columns_ptr, image, tokens, heads, head, n, D: tl.constexpr, DP: tl.constexpr):
    """v [T, DP], dequantized."""
    d = tl.arange(0, DP)
    column = (2 * heads + head) * D + d
    code = load_codes(codes_ptr, image, tokens, heads, head, 2, n, D, DP)
    scale = tl.load(columns_ptr + column, mask=d < D, other=0.0)
    offset = tl.load(columns_ptr + 3 * heads * D + column, mask=d < D, other=0.0)
    return (code.to(tl.float32) * scale[None, :] + offset[None, :]).to(code.dtype)


@triton.jit
def load_grad(grad_ptr, image, tokens, heads, head, m, D: tl.constexpr, DP: tl.constexpr):
    """The gradient [M, DP] of one head's output."""
    d = tl.arange(0, DP)
    first = grad_ptr + image.to(tl.int64) * tokens * (heads * D) + head * D
    return tl.load(first + m[:, None] * (heads * D) + d[None, :], mask=(m < tokens)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def score_scale(columns_ptr, heads, head, factor, D: tl.constexpr):
    """What turns sums of products of codes into scores to the base 2."""
    return tl.load(columns_ptr + head * D) * tl.load(columns_ptr + (heads + head) * D) * factor * 1.4426950408889634
