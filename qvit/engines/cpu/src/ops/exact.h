// The float steps in float64, for the few values that lie too close to the boundary between two codes.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>

namespace {

struct ExactMoments {
    double mean, rstd;
};

inline ExactMoments exact_moments(const float* x, int n, double eps) {
    double sum = 0.0, squares = 0.0;
    for (int i = 0; i < n; i++) {
        sum += static_cast<double>(x[i]);
    }
    const double mean = sum / n;
    for (int i = 0; i < n; i++) {
        const double d = static_cast<double>(x[i]) - mean;
        squares += d * d;
    }
    return {mean, 1.0 / sqrt(squares / n + eps)};
}

// The code of a float32, in the reference engine's operations.
inline int exact_code(float x, float offset, float scale, float low, float high) {
    const float v = nearbyintf((x - offset) / scale);
    return static_cast<int>(!(v > low) ? low : v > high ? high : v);  // not a number: low
}

inline double exact_gelu(double x, qvit::cpu::Activation activation) {
    using qvit::cpu::Activation;
    if (activation == Activation::gelu) {
        return 0.5 * x * (1.0 + erf(x * 0.70710678118654752440));
    }
    if (activation == Activation::quick_gelu) {
        return x / (1.0 + exp(-1.702 * x));
    }
    return 0.5 * x * (1.0 + tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
}

// The code behind an activation of a pre-activation y, less `low`.
inline uint8_t exact_gelu_code(float y, qvit::cpu::Activation activation, const qvit::cpu::Quantize& q, int c, float row_scale) {
    const float g = static_cast<float>(exact_gelu(static_cast<double>(y), activation));
    return static_cast<uint8_t>(exact_code(g, q.offset[c], q.scale[c] * row_scale, q.low, q.high) - static_cast<int>(q.low));
}

}  // namespace
