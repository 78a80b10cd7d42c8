// The activation, then codes (EPILOGUE 1).
#pragma once

#include "send_codes.cuh"

__device__ __forceinline__ int activation_code(const GemmArgs& p, int sum, int c, float scale, float bias, float inverse,
                                               float offset) {
    const float y = affine(sum, scale, bias);
    const float v = clamp((fast_activation<ACTIVATION>(y) - offset) * inverse, p.low, p.high);
    if (is_close(v, p.margin)) {
        const float g = __double2float_rn(exact_activation<ACTIVATION>(static_cast<double>(y)));
        return exact_code(g, offset, p.step[c], p.low, p.high);
    }
    return code_of(v);
}

#if THRESHOLDS
// A code less the lowest, by comparisons.
__device__ __forceinline__ int compared(int sum, const uint4& t) {
    return (sum >= static_cast<int>(t.x)) + (sum >= static_cast<int>(t.y)) + (sum >= static_cast<int>(t.z)) +
           (sum < static_cast<int>(t.w));
}
#endif

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char* lines,
                                       int (&sums)[kRows][kColumns][4]) {
#if THRESHOLDS
    const int lowest = static_cast<int>(p.low);
#endif
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
        const int c = column0 + 8 * j + 2 * (lane % 4);
#if THRESHOLDS
        const uint4 thresholds[2] = {p.thresholds[c], p.thresholds[c + 1]};
#else
        float scale[2], bias[2], inverse[2], offset[2];
        load_pair(p.scale + c, scale);
        load_pair(p.bias + c, bias);
        load_pair(p.inverse + c, inverse);
        load_pair(p.offset + c, offset);
#endif
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int codes[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int sum = sums[i][j][2 * half + e];
#if THRESHOLDS
                    codes[e] = compared(sum, thresholds[e]) + lowest;
#else
                    codes[e] = activation_code(p, sum, c + e, scale[e], bias[e], inverse[e], offset[e]);
#endif
                }
                put(lines, 16 * i + 8 * half + lane / 4, 8 * j + 2 * (lane % 4), codes[0], codes[1]);
            }
        }
    }
#if OUT_BITS
    send_bits(lines, lane, row0, p.m, p.out, column0, p.n, p.ldo, [](int row) { return row; });
#else
    send(lines, lane, row0, p.m, [&](int row, int column) -> unsigned char* {
        const int c = column0 + column;
        return c < p.n ? static_cast<unsigned char*>(p.out) + code_at(row, c, p.ldo) : nullptr;
    });
#endif
}
