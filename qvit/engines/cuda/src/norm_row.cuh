// LayerNorm of a row that a warp has in its registers, and the codes behind it. The includer says how long a row is (CHANNELS)
// and how many neighbours a lane takes together (kVector).
#pragma once

#include "moments.cuh"
#include "rounding.cuh"
#include "stream.cuh"

struct NormArgs {
    const Source* x;      // rows, ldx apart
    const float* weight;  // [C]
    const float* bias;
    const float* gain;    // [C]: weight / step, and (bias - offset) / step
    const float* shift;
    const float* offset;  // of the codes [C]
    const float* step;
    const int* index;     // GATHER: [rows, GATHER], rows of x
    void* out;            // codes, ldo tiles a row, or floats, rows ldo apart
    long long ldx, ldo;
    int rows;
    float low, high, margin;
    double eps;
};

constexpr int kLanes = (CHANNELS + 31) / 32;  // values a lane

__device__ __forceinline__ int channel(int i, int lane) { return i / kVector * 32 * kVector + lane * kVector + i % kVector; }

// A lane's values of a row; `at`: where a channel is. Zeros beyond the last.
template <class At>
__device__ __forceinline__ void load_row(const At& at, int lane, float (&x)[kLanes]) {
#pragma unroll
    for (int i = 0; i < kLanes; i += kVector) {
        const int c = channel(i, lane);
        if constexpr (kVector == 1) {
            x[i] = c < CHANNELS ? value_of(*at(c)) : 0.0f;
        } else {
            float values[kVector];
            load_values(at(c), values);
#pragma unroll
            for (int e = 0; e < kVector; e++) {
                x[i + e] = values[e];
            }
        }
    }
}

__device__ inline Moments exact_moments(const float (&x)[kLanes], int lane, double eps) {
    return exact_moments<CHANNELS>(x, eps, [&](int i) { return channel(i, lane) < CHANNELS; });
}

__device__ __forceinline__ float exact_value(const NormArgs& p, const Moments& of, float x, int c) {
    const double z = (static_cast<double>(x) - of.mean) * of.rstd;
    return __double2float_rn(z * static_cast<double>(p.weight[c]) + static_cast<double>(p.bias[c]));
}

// Codes of a lane's values; `gain(i)`, `shift(i)`: of `p`, for its value i; `doubt(i)` where the code may be wrong.
template <class Gain, class Shift, class Doubt>
__device__ __forceinline__ void row_codes(const NormArgs& p, const float (&x)[kLanes], const Gain& gain, const Shift& shift,
                                          int lane, int (&codes)[kLanes], const Doubt& doubt) {
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        sum += x[i];
    }
    const float mean = warp_sum(sum) * (1.0f / CHANNELS);
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const float d = channel(i, lane) < CHANNELS ? x[i] - mean : 0.0f;
        squares = fmaf(d, d, squares);
    }
    const float rstd = rsqrtf(warp_sum(squares) * (1.0f / CHANNELS) + static_cast<float>(p.eps));
    const float margin = p.margin * (1.0f + 0.25f * fabsf(mean) * rstd);
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        codes[i] = 0;
        if (channel(i, lane) < CHANNELS) {
            const float v = clamp(fmaf((x[i] - mean) * rstd, gain(i), shift(i)), p.low, p.high);
            if (is_close(v, margin)) {
                doubt(i);
            }
            codes[i] = code_of(v);
        }
    }
}

// A lane's bytes of a row; `at`: where a channel is.
template <class At>
__device__ __forceinline__ void store_row(const At& at, int lane, const int (&codes)[kLanes]) {
#pragma unroll
    for (int i = 0; i < kLanes; i += kVector) {
        const int c = channel(i, lane);
        if constexpr (kVector == 4) {
            *reinterpret_cast<uint32_t*>(at(c)) =
                (codes[i] & 0xFF) | (codes[i + 1] & 0xFF) << 8 | (codes[i + 2] & 0xFF) << 16 | (codes[i + 3] & 0xFFu) << 24;
        } else if constexpr (kVector == 2) {
            *reinterpret_cast<uint16_t*>(at(c)) = static_cast<uint16_t>((codes[i] & 0xFF) | (codes[i + 1] & 0xFF) << 8);
        } else if (c < CHANNELS) {
            *at(c) = static_cast<uint8_t>(codes[i]);
        }
    }
}
