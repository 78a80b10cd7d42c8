// The float steps in float64, for the few values that lie too close to the boundary between two codes.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>

namespace {

struct ExactMoments {
    double mean, rstd;
};

// Four sums apart, so that additions do not wait for each other.
template <class Term>
inline double exact_sum(int n, const Term& term) {
    double parts[4] = {0.0, 0.0, 0.0, 0.0};
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        for (int j = 0; j < 4; j++) {
            parts[j] += term(i + j);
        }
    }
    for (; i < n; i++) {
        parts[0] += term(i);
    }
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

inline ExactMoments exact_moments(const float* x, int n, double eps) {
    const double mean = exact_sum(n, [&](int i) { return static_cast<double>(x[i]); }) / n;
    const double squares = exact_sum(n, [&](int i) {
        const double d = static_cast<double>(x[i]) - mean;
        return d * d;
    });
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
