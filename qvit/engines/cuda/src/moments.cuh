// Mean and deviation of a row, of which each lane has some values.
#pragma once

#include "warp.cuh"

struct Moments {
    double mean, rstd;
};

// As they are defined, of a warp's row; `there(i)`: whether the lane's value i is one of its kWidth.
template <int kWidth, int kOwn, class There>
__device__ __forceinline__ Moments exact_moments(const float (&x)[kOwn], double eps, const There& there) {
    double sum = 0.0, squares = 0.0;
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        sum += there(i) ? static_cast<double>(x[i]) : 0.0;
    }
    const double mean = warp_sum(sum) / kWidth;
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        const double d = there(i) ? static_cast<double>(x[i]) - mean : 0.0;
        squares += d * d;
    }
    return {mean, 1.0 / sqrt(warp_sum(squares) / kWidth + eps)};
}

// Over so many neighbouring lanes.
template <int kLanes, class T>
__device__ __forceinline__ void add_both(T& sum, T& squares) {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
        sum += __shfl_xor_sync(kAll, sum, mask);
        squares += __shfl_xor_sync(kAll, squares, mask);
    }
}

// The same as `exact_moments` in one pass, `near` being the mean or nearly so: the square of what is between them is too small to
// take digits from the variance.
template <int kWidth, int kOwn, class There>
__device__ __forceinline__ Moments moments_near(const float (&x)[kOwn], float near, double eps, const There& there) {
    double sum = 0.0, squares = 0.0;
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        const double d = there(i) ? static_cast<double>(x[i]) - static_cast<double>(near) : 0.0;
        sum += d;
        squares = fma(d, d, squares);
    }
    add_both<32>(sum, squares);
    const double beside = sum * (1.0 / kWidth);
    return {static_cast<double>(near) + beside, rsqrt(squares * (1.0 / kWidth) - beside * beside + eps)};
}
