"""Device functions that the kernels share."""

import triton
import triton.language as tl

# Adding and subtracting 1.5 * 2^23 rounds a float32 of magnitude below 2^22 to the nearest whole number, halves to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_half_even(x):
    """Nearest whole number of float32 ``|x| < 2^22``, as PyTorch's ``round`` gives it."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def quantize(x, inverse_scale, offset, qn, qp):
    """x -> (position ``(x - offset) / scale``, its code, whether it lies in the range)."""
    v = (x - offset) * inverse_scale
    code = round_half_even(tl.minimum(tl.maximum(v, qn), qp))
    return v, code, (v >= qn) & (v <= qp)


@triton.jit
def activation(x, KIND: tl.constexpr):
    """The activation between fc1 and fc2, by its name in `qvit.architecture`; ``none`` is the identity."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "quick_gelu":
        return x * tl.sigmoid(1.702 * x)
    else:
        return x


@triton.jit
def activation_slope(x, KIND: tl.constexpr):
    """The derivative of `activation`."""
    if KIND == "gelu":
        return 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        return s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif KIND == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        return s + x * s * (1.0 - s) * 1.702
    else:
        return x * 0.0 + 1.0
