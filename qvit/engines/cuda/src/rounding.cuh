// From floats to codes: float32 where it is surely right, else the definition (`qvit/quantizers/exact_float.py`) in float64.
//
// A fast value lies within `margin` of the real one. Only where it is that near to the boundary between two codes does it matter,
// and there the value is computed again as the reference engine defines it, so that every code is the reference engine's.
#pragma once

#include "warp.cuh"

constexpr float kWhole = 12582912.0f;   // 1.5 * 2^23: adding it rounds to a whole number, half to even
constexpr int kWholeBits = 0x4B400000;  // its bits: a small whole number added to these is added to the float

__device__ __forceinline__ float clamp(float v, float low, float high) { return fminf(fmaxf(v, low), high); }

// The code of a clamped value.
__device__ __forceinline__ int code_of(float clamped) { return __float_as_int(clamped + kWhole) - kWholeBits; }

__device__ __forceinline__ bool is_close(float clamped, float margin) {
    return fabsf(clamped - ((clamped + kWhole) - kWhole)) > 0.5f - margin;
}

// a b + c, not below 0 and not above 1.
__device__ __forceinline__ float multiply_add_saturated(float a, float b, float c) {
#ifdef QVIT_EMULATION
    return clamp(fmaf(a, b, c), 0.0f, 1.0f);
#else
    float d;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
#endif
}

// The code of a float32, in the reference engine's operations.
__device__ inline int exact_code(float x, float offset, float scale, float low, float high) {
    const float v = rintf(__fdiv_rn(__fsub_rn(x, offset), scale));
    return static_cast<int>(clamp(v, low, high));
}

// The code of a float32: the product with the inverse is within two units of the last place of the quotient.
__device__ __forceinline__ int quotient_code(float x, float offset, float inverse, float scale, float low, float high) {
    const float v = clamp(__fmul_rn(__fsub_rn(x, offset), inverse), low, high);
    return is_close(v, 3e-7f * (1.0f + high - low)) ? exact_code(x, offset, scale, low, high) : code_of(v);
}

enum Activation { kGelu = 0, kGeluTanh = 1, kQuickGelu = 2 };

template <int kActivation>
__device__ inline double exact_activation(double x) {
    if (kActivation == kGelu) {
        return 0.5 * x * (1.0 + erf(x * 0.70710678118654752440));
    }
    if (kActivation == kQuickGelu) {
        return x / (1.0 + exp(-1.702 * x));
    }
    return 0.5 * x * (1.0 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
}

// Within 3e-7 + 3e-7 |x| of the real value.
template <int kActivation>
__device__ __forceinline__ float fast_activation(float x) {
    if (kActivation == kGelu) {
        return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    }
    // x / (1 + exp(-2 u)) is x / 2 * (1 + tanh(u)).
    const float u = kActivation == kQuickGelu ? 1.702f * x : 1.5957691216f * (x + 0.044715f * x * x * x);
    return x * reciprocal_fast(1.0f + exp2_fast(fminf(-1.44269504f * u, 126.0f)));
}
