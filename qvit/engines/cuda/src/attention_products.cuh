// The products of attention, where they differ from other kernels': sums that begin as floats' bits, and operands made of rows of
// values in shared memory.
#pragma once

#include "rounding.cuh"

#ifdef QVIT_EMULATION
inline void multiply_first(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    d[0] = d[1] = d[2] = d[3] = kWholeBits;
    multiply<true>(d, a, b);
}
#else
// d = kWholeBits + a b of signed bytes: the bits of the float kWhole + a b.
__device__ __forceinline__ void multiply_first(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(kWholeBits));
}

// `load_matrices` of transposed matrices of 16-bit elements.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}
#endif

// x * 2^exponent, both a normal number.
__device__ __forceinline__ double scaled_by(double x, int exponent) {
    return __hiloint2double(__double2hiint(x) + (exponent << 20), __double2loint(x));
}

__device__ __forceinline__ int first_bit(unsigned x) { return __ffs(static_cast<int>(x)) - 1; }

// exp(x), |x| < 700, without a branch, so that several go side by side: 2^n times the series of the rest, of 14 terms, which leave
// 4e-18. Even and odd ones are two chains.
__device__ __forceinline__ double exp_series(double x) {
    constexpr double kTwice = 6755399441055744.0;  // 1.5 * 2^52
    const double shifted = fma(x, 1.4426950408889634, kTwice), n = shifted - kTwice;
    const double rest = fma(n, -1.9082149292705877e-10, fma(n, -0.69314718036912382, x)), square = rest * rest;
    double even = 1.0 / 479001600.0, odd = 1.0 / 6227020800.0;
    constexpr double kEven[6] = {1.0 / 3628800.0, 1.0 / 40320.0, 1.0 / 720.0, 1.0 / 24.0, 1.0 / 2.0, 1.0};
    constexpr double kOdd[6] = {1.0 / 39916800.0, 1.0 / 362880.0, 1.0 / 5040.0, 1.0 / 120.0, 1.0 / 6.0, 1.0};
#pragma unroll
    for (int i = 0; i < 6; i++) {
        even = fma(even, square, kEven[i]);
        odd = fma(odd, square, kOdd[i]);
    }
    return scaled_by(fma(odd, rest, even), __double2loint(shifted));
}

// The values of 32 keys, rows of 16 kColumns channels, become operands, in place, by a warp: 512 bytes for 16 channels each. A lane's
// 16 bytes are b[0], b[1] of the product over even channels, and those of the one over odd channels: of column g = lane / 4, keys
// 2t, 2t + 1, 8 + 2t, 9 + 2t (and 16 more), t = lane % 4. A transposed matrix gives a lane two keys of two neighbouring channels.
template <int kColumns>
__device__ __forceinline__ void turn(unsigned char* rows) {
    const int lane = threadIdx.x % 32;
    uint32_t w[kColumns][4];
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
        load_transposed(w[j], rows + 16 * (kColumns * lane + j));
    }
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
        *reinterpret_cast<uint4*>(rows + 512 * j + 16 * lane) = {
            __byte_perm(w[j][0], w[j][1], 0x6420), __byte_perm(w[j][2], w[j][3], 0x6420),
            __byte_perm(w[j][0], w[j][1], 0x7531), __byte_perm(w[j][2], w[j][3], 0x7531)};
    }
}
