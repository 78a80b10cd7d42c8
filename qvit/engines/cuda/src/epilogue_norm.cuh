// Floats go out, then the codes of their LayerNorm: a warp has whole rows, kWN is the width of a row (EPILOGUE 3).
#pragma once

#include "residual.cuh"
#include "send_codes.cuh"

// The codes of columns first .. first + kOut of one of a quad's rows, as they are defined; `mine`: for this lane's columns. Reads
// the floats that these lanes have just written, so that nothing is held in registers for a case that is rare.
#ifndef QVIT_EMULATION
__noinline__
#endif
__device__ inline void codes_again(const GemmArgs& p, int r, int line, int first, int lane, bool mine, unsigned char* lines) {
    const float* x = static_cast<const float*>(p.out) + static_cast<size_t>(float_row(p, r)) * p.ldo + 2 * (lane % 4);
    double sum = 0.0, squares = 0.0;
#pragma unroll 1
    for (int c = 0; c < kWN; c += 8) {
        sum += static_cast<double>(x[c]) + static_cast<double>(x[c + 1]);
    }
    const double mean = quad_sum(sum) / kWN;
#pragma unroll 1
    for (int c = 0; c < kWN; c += 8) {
        const double a = static_cast<double>(x[c]) - mean, b = static_cast<double>(x[c + 1]) - mean;
        squares += a * a + b * b;
    }
    const double rstd = 1.0 / sqrt(quad_sum(squares) / kWN + p.eps);
    if (mine) {
#pragma unroll 1
        for (int i = 0; i < kOut / 4; i++) {
            const int from = first + i / 2 * 8 + i % 2, c = from + 2 * (lane % 4);
            const double z = (static_cast<double>(x[from]) - mean) * rstd;
            const float y = __double2float_rn(z * static_cast<double>(p.weight[c]) + static_cast<double>(p.affine[c]));
            lines[line * kLine + c - first] = static_cast<unsigned char>(exact_code(y, p.offset[c], p.step[c], p.low, p.high));
        }
    }
}

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int, int lane, unsigned char* lines,
                                       int (&sums)[kRows][kColumns][4]) {
    static_assert(kRows == 1, "a warp holds 16 rows");
    const int c0 = 2 * (lane % 4);
    float y[kColumns][4];
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
        float scale[2], bias[2];
        load_pair(p.scale + c0 + 8 * j, scale);
        load_pair(p.bias + c0 + 8 * j, bias);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float pair[2] = {affine(sums[0][j][2 * half], scale[0], bias[0]),
                             affine(sums[0][j][2 * half + 1], scale[1], bias[1])};
            const int r = row0 + 8 * half + lane / 4;
            if (r < p.m) {
                add_up(p, r, c0 + 8 * j, pair);
            }
            y[j][2 * half] = pair[0], y[j][2 * half + 1] = pair[1];
        }
    }
    float mean[2], rstd[2], near[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
            sum += y[j][2 * half] + y[j][2 * half + 1];
        }
        mean[half] = quad_sum(sum) * (1.0f / kWN);
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
            const float a = y[j][2 * half] - mean[half], b = y[j][2 * half + 1] - mean[half];
            squares = fmaf(a, a, fmaf(b, b, squares));
        }
        rstd[half] = rsqrtf(quad_sum(squares) * (1.0f / kWN) + static_cast<float>(p.eps));
        near[half] = p.margin * (1.0f + 0.25f * fabsf(mean[half]) * rstd[half]);
    }
#pragma unroll
    for (int first = 0; first < kWN; first += kOut) {
        __syncwarp();  // the codes before have gone out
        bool close[2] = {false, false};
#pragma unroll
        for (int j = 0; j < kOut / 8; j++) {
            const int c = first + 8 * j + c0;
            float gain[2], shift[2];
            load_pair(p.inverse + c, gain);
            load_pair(p.shift + c, shift);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int code[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float z = (y[first / 8 + j][2 * half + e] - mean[half]) * rstd[half];
                    const float v = clamp(fmaf(z, gain[e], shift[e]), p.low, p.high);
                    close[half] |= is_close(v, near[half]);
                    code[e] = code_of(v);
                }
                put(lines, 8 * half + lane / 4, 8 * j + c0, code[0], code[1]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int line = 8 * half + lane / 4, r = row0 + line;
            const bool mine = close[half] && r < p.m;
            if (__any_sync(kAll, mine)) {  // the whole warp, since a quad adds up together
                codes_again(p, r < p.m ? r : p.m - 1, line, first, lane, mine, lines);
            }
        }
#if OUT_BITS
        send_bits(lines, lane, row0, p.m, p.out_k, first, kWN, p.chunks, [&](int row) { return code_row(p, row); });
#else
        send(lines, lane, row0, p.m, [&](int row, int column) -> unsigned char* {
            return static_cast<unsigned char*>(p.out_k) + code_at(code_row(p, row), first + column, p.chunks);
        });
#endif
    }
}
