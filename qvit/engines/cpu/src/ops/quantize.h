// LayerNorm, and floats to codes.
#pragma once

#include <string.h>

#include "exact.h"

namespace {

using qvit::cpu::Norm;
using qvit::cpu::Quantize;

template <class V>
inline void store_some(uint8_t* out, typename V::I codes, int n) {
    if (n >= V::W) {
        V::store_bytes(out, codes);
    } else {
        uint8_t lanes[V::W];
        V::store_bytes(lanes, codes);
        memcpy(out, lanes, static_cast<size_t>(n));
    }
}

// (x - offset) / scale; one step of correction makes the product with the reciprocal the rounded quotient, but for rare cases.
template <class V>
inline typename V::F divided(typename V::F x, typename V::F offset, typename V::F inverse, typename V::F scale) {
    const auto d = V::sub(x, offset);
    const auto v = V::mul(d, inverse);
    return V::fma(V::fnma(v, scale, d), inverse, v);
}

// Clamped and rounded; stored codes, that is, less `low`.
template <class V>
inline typename V::I stored_codes(typename V::F value, typename V::F low, typename V::F high) {
    const auto clamped = V::min(V::max(value, low), high);
    return V::isub(V::to_int(clamped), V::to_int(low));
}

// Clamped, and how far that is from a whole number joined to `far`.
template <class V>
inline typename V::F clamped(typename V::F value, typename V::F low, typename V::F high, typename V::F& far) {
    const auto c = V::min(V::max(value, low), high);
    far = V::max_abs(far, V::off_grid(c));
    return c;
}

template <class V>
inline bool close_call(typename V::F far, float margin) {
    return V::largest(V::abs(far)) > 0.5f - margin;
}

inline bool is_close(float value, float margin) { return fabsf(value - nearbyintf(value)) > 0.5f - margin; }

// A margin is that of the largest values that occur; this is the one of a value that was put together from parts of this size.
constexpr float kUnit = 1e-6f;
inline float margin_of(float size, float most) { return most < 0.5f && kUnit * size < most ? kUnit * size : most; }

// The margin of a row: its mean loses digits where it is large beside the deviation.
inline float row_margin(float margin, float mean, float rstd) { return margin * (1.0f + 0.25f * fabsf(mean) * rstd); }

struct Moments {
    float mean, rstd;
};

template <class V>
inline Moments moments(const float* x, int n, float eps) {
    auto s0 = V::set(0.0f), s1 = s0, s2 = s0, s3 = s0;
    int i = 0;
    for (; i + 4 * V::W <= n; i += 4 * V::W) {
        s0 = V::add(s0, V::load(x + i));
        s1 = V::add(s1, V::load(x + i + V::W));
        s2 = V::add(s2, V::load(x + i + 2 * V::W));
        s3 = V::add(s3, V::load(x + i + 3 * V::W));
    }
    for (; i < n; i += V::W) {
        s0 = V::add(s0, V::first(V::load(x + i), n - i < V::W ? n - i : V::W));
    }
    const float mean = V::sum(V::add(V::add(s0, s1), V::add(s2, s3))) / static_cast<float>(n);
    const auto m = V::set(mean);
    s0 = s1 = s2 = s3 = V::set(0.0f);
    for (i = 0; i + 4 * V::W <= n; i += 4 * V::W) {
        const auto d0 = V::sub(V::load(x + i), m), d1 = V::sub(V::load(x + i + V::W), m);
        const auto d2 = V::sub(V::load(x + i + 2 * V::W), m), d3 = V::sub(V::load(x + i + 3 * V::W), m);
        s0 = V::fma(d0, d0, s0);
        s1 = V::fma(d1, d1, s1);
        s2 = V::fma(d2, d2, s2);
        s3 = V::fma(d3, d3, s3);
    }
    for (; i < n; i += V::W) {
        const auto d = V::first(V::sub(V::load(x + i), m), n - i < V::W ? n - i : V::W);
        s0 = V::fma(d, d, s0);
    }
    const float variance = V::sum(V::add(V::add(s0, s1), V::add(s2, s3))) / static_cast<float>(n);
    return {mean, 1.0f / sqrtf(variance + eps)};
}

// Whole rows are rare (before the blocks, after them, and pooled), and what follows them needs every bit: in float64.
template <class V>
void layer_norm(const Norm& norm, const float* x, ptrdiff_t ldx, int rows, float* y, ptrdiff_t ldy) {
    for (int r = 0; r < rows; r++, x += ldx, y += ldy) {
        const ExactMoments of = exact_moments(x, norm.channels, norm.eps);
        for (int c = 0; c < norm.channels; c++) {
            const double z = (static_cast<double>(x[c]) - of.mean) * of.rstd;
            y[c] = static_cast<float>(z * static_cast<double>(norm.weight[c]) + static_cast<double>(norm.bias[c]));
        }
    }
}

template <class V>
inline typename V::F norm_value(const Norm& norm, const float* x, int c, typename V::F mean, typename V::F rstd,
                                typename V::F own) {
    const auto z = V::mul(V::sub(V::load(x + c), mean), rstd);
    return V::mul(V::fma(z, V::load(norm.gain + c), V::load(norm.shift + c)), own);
}

// The codes of a row that are close calls, again.
template <class V>
void norm_codes_again(const Norm& norm, const Quantize& q, const float* x, typename V::F mean, typename V::F rstd,
                      typename V::F own, float margin, float row_scale, uint8_t* out) {
    ExactMoments of{};
    bool have = false;
    const float by_mean = (margin - norm.margin) / kUnit;
    float values[V::W], inverse[V::W];
    V::store(inverse, own);
    for (int c = 0; c < norm.channels; c += V::W) {
        V::store(values, norm_value<V>(norm, x, c, mean, rstd, own));
        for (int i = c; i < norm.channels && i < c + V::W; i++) {
            const float value = values[i - c], size = 1.0f + fabsf(value) + fabsf(norm.shift[i] * inverse[0]);
            if (is_close(value, margin_of(size + by_mean, margin))) {
                if (!have) {
                    of = exact_moments(x, norm.channels, norm.eps);
                    have = true;
                }
                const double z = (static_cast<double>(x[i]) - of.mean) * of.rstd;
                const float y = static_cast<float>(z * static_cast<double>(norm.weight[i]) + static_cast<double>(norm.bias[i]));
                out[i] = static_cast<uint8_t>(exact_code(y, q.offset[i], q.scale[i] * row_scale, q.low, q.high) -
                                              static_cast<int>(q.low));
            }
        }
    }
}

template <class V>
void norm_codes(const Norm& norm, const Quantize& q, const float* x, ptrdiff_t ldx, int row0, int rows, uint8_t* out,
                ptrdiff_t ld_out) {
    const auto low = V::set(q.low), high = V::set(q.high);
    const auto stored = V::iset(static_cast<int32_t>(q.low));
    for (int r = 0; r < rows; r++, x += ldx, out += ld_out) {
        const Moments of = moments<V>(x, norm.channels, static_cast<float>(norm.eps));
        const auto mean = V::set(of.mean), rstd = V::set(of.rstd);
        const auto own = V::set(q.row_inverse ? q.row_inverse[row0 + r] : 1.0f);
        auto far = V::set(0.0f);
        for (int c = 0; c < norm.channels; c += V::W) {
            const auto v = clamped<V>(norm_value<V>(norm, x, c, mean, rstd, own), low, high, far);
            store_some<V>(out + c, V::isub(V::to_int(v), stored), norm.channels - c);
        }
        const float margin = row_margin(norm.margin, of.mean, of.rstd);
        if (close_call<V>(far, margin)) {
            norm_codes_again<V>(norm, q, x, mean, rstd, own, margin, q.row_inverse ? q.row_scale[row0 + r] : 1.0f, out);
        }
        memset(out + norm.channels, 0, static_cast<size_t>(ld_out - norm.channels));
    }
}

template <class V>
void pixel_codes(const float* x, int n, float std, float offset, float scale, float high, uint8_t* out) {
    float lanes[V::W];
    for (int i = 0; i < n; i += V::W) {
        const int some = n - i < V::W ? n - i : V::W;
        memset(lanes, 0, sizeof lanes);
        memcpy(lanes, x + i, sizeof(float) * static_cast<size_t>(some));
        const auto v = V::div(V::sub(V::mul(V::load(lanes), V::set(std)), V::set(offset)), V::set(scale));
        store_some<V>(out + i, stored_codes<V>(v, V::set(0.0f), V::set(high)), some);
    }
}

template <class V>
inline typename V::I quantized(const Quantize& q, typename V::F x, int c, float row_inverse, float row_scale) {
    const auto inverse = V::mul(V::load(q.inverse + c), V::set(row_inverse));
    const auto scale = V::mul(V::load(q.scale + c), V::set(row_scale));
    return stored_codes<V>(divided<V>(x, V::load(q.offset + c), inverse, scale), V::set(q.low), V::set(q.high));
}

template <class V>
void codes(const Quantize& q, const float* x, ptrdiff_t ldx, int row0, int rows, uint8_t* out, ptrdiff_t ld_out) {
    for (int r = 0; r < rows; r++, x += ldx, out += ld_out) {
        const float row_inverse = q.row_inverse ? q.row_inverse[row0 + r] : 1.0f;
        const float row_scale = q.row_inverse ? q.row_scale[row0 + r] : 1.0f;
        for (int c = 0; c < q.channels; c += V::W) {
            store_some<V>(out + c, quantized<V>(q, V::load(x + c), c, row_inverse, row_scale), q.channels - c);
        }
        memset(out + q.channels, 0, static_cast<size_t>(ld_out - q.channels));
    }
}

}  // namespace
