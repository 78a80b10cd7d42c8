// Codes of q, k and v, in heads; q and k rectified (IRM) before (EPILOGUE 2).
#pragma once

#include "send_codes.cuh"

constexpr int kHeadColumns = HEAD_DIM / 8;  // fragments

// The two rows of one head that a quad holds, from sums to codes.
__device__ __forceinline__ void rectified(const GemmArgs& p, float (&y)[kHeadColumns][4], int c0, float low, float high,
                                          float margin, int (&codes)[kHeadColumns][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int j = 0; j < kHeadColumns; j++) {
            sum += y[j][2 * half] + y[j][2 * half + 1];
        }
        const float mean = quad_sum(sum) * (1.0f / HEAD_DIM);
#pragma unroll
        for (int j = 0; j < kHeadColumns; j++) {
            const float a = y[j][2 * half] - mean, b = y[j][2 * half + 1] - mean;
            squares = fmaf(a, a, fmaf(b, b, squares));
        }
        const float rstd = rsqrtf(quad_sum(squares) * (1.0f / HEAD_DIM) + static_cast<float>(p.eps));
        const float near = margin * (1.0f + 0.25f * fabsf(mean) * rstd);
        bool close = false;
#pragma unroll
        for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int c = c0 + 8 * j + e;
                const float v = clamp(fmaf((y[j][2 * half + e] - mean) * rstd, p.inverse[c], p.shift[c]), low, high);
                close |= is_close(v, near);
                codes[j][2 * half + e] = code_of(v);
            }
        }
        if (__any_sync(kAll, close)) {  // the whole warp, since a quad adds up together
            double wide = 0.0, wide_squares = 0.0;
#pragma unroll
            for (int j = 0; j < kHeadColumns; j++) {
                wide += static_cast<double>(y[j][2 * half]) + static_cast<double>(y[j][2 * half + 1]);
            }
            const double exact_mean = quad_sum(wide) / HEAD_DIM;
#pragma unroll
            for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const double d = static_cast<double>(y[j][2 * half + e]) - exact_mean;
                    wide_squares += d * d;
                }
            }
            const double exact_rstd = 1.0 / sqrt(quad_sum(wide_squares) / HEAD_DIM + p.eps);
            if (close) {
#pragma unroll
                for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int c = c0 + 8 * j + e;
                        const float z = __double2float_rn((static_cast<double>(y[j][2 * half + e]) - exact_mean) * exact_rstd);
                        const float x = __fadd_rn(__fmul_rn(z, p.weight[c]), p.affine[c]);
                        codes[j][2 * half + e] = exact_code(x, p.offset[c], p.step[c], low, high);
                    }
                }
            }
        }
    }
}

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char* lines,
                                       int (&sums)[kRows][kColumns][4]) {
    const int width = p.heads * HEAD_DIM;
#pragma unroll
    for (int head = 0; head < kWN / HEAD_DIM; head++) {
        const int first = column0 + head * HEAD_DIM, part = first / width, c0 = first + 2 * (lane % 4);
        const float low = part == 0 ? p.low : part == 1 ? p.low_k : p.low_v;
        const float high = part == 0 ? p.high : part == 1 ? p.high_k : p.high_v;
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            float y[kHeadColumns][4];
            int codes[kHeadColumns][4];
#pragma unroll
            for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int c = c0 + 8 * j + e % 2;
                    y[j][e] = affine(sums[i][head * kHeadColumns + j][e], p.scale[c], p.bias[c]);
                }
            }
            if (RECTIFY && part < 2) {
                rectified(p, y, c0, low, high, part == 0 ? p.margin : p.margin_k, codes);
            } else {
#pragma unroll
                for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int c = c0 + 8 * j + e % 2;
                        codes[j][e] = quotient_code(y[j][e], p.offset[c], p.inverse[c], p.step[c], low, high);
                    }
                }
            }
            const bool doubled = Q_DOUBLED && part == 0;  // c + 1/2, twice
#pragma unroll
            for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int one = codes[j][2 * half], two = codes[j][2 * half + 1];
                    put(lines, 16 * i + 8 * half + lane / 4, head * HEAD_DIM + 8 * j + 2 * (lane % 4),
                        doubled ? 2 * one + 1 : one, doubled ? 2 * two + 1 : two);
                }
            }
        }
    }
    send(lines, lane, row0, p.m, [&](int row, int column) -> unsigned char* {
        const int c = column0 + column, part = c / width, head = c % width / HEAD_DIM;
        if (part > 2) {
            return nullptr;
        }
        void* const to = part == 0 ? p.out : part == 1 ? p.out_k : p.out_v;
        const size_t line = static_cast<size_t>(row / p.tokens * p.heads + head) * p.tokens + row % p.tokens;
        return static_cast<unsigned char*>(to) + line * HEAD_DIM + c % HEAD_DIM;
    });
}
