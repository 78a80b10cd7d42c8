// LayerNorm of a row that a warp has in its registers. The includer says how long a row is (CHANNELS)
// and how many neighbours a lane takes together (kVector).
#pragma once

#include "moments.cuh"
#include "rounding.cuh"
#include "stream.cuh"

struct NormArgs {
    const Source* x;      // rows, ldx apart
    const float* weight;  // [C]
    const float* bias;
    const float* gain;    // [C]: of standardised values to places in the codes' range, see `norm_places.cuh`
    const float* shift;
    const float* offset;  // of the codes [C]
    const float* step;
    const int* index;     // GATHER: [rows, GATHER], rows of x
    void* out;            // codes, ldo tiles a row, or floats, rows ldo apart
    long long ldx, ldo;
    int rows;
    float low, high;
    float margin, slope;  // how far a place may be from the true one, in codes: margin + slope E[x^2] / Var[x]
    float eps_float;
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
__device__ __forceinline__ int exact_code_at(const NormArgs& p, const Moments& of, float x, int c) {
    return exact_code(exact_value(p, of, x, c), p.offset[c], p.step[c], p.low, p.high);
}
