// Floats go out, then the codes of their LayerNorm: a warp has whole rows, kWN is the width of a row (EPILOGUE 3).
#pragma once

#include "residual.cuh"
#include "send_codes.cuh"

// The codes of row r, as they are defined: the whole warp together, from the floats that it has just written, so that nothing is
// held in registers for a case that is rare.
#ifndef QVIT_EMULATION
__noinline__
#endif
__device__ inline void codes_again(const GemmArgs& p, int r, int lane) {
    constexpr int kOwn = kWN / 32;  // columns a lane
    const float* from = static_cast<const float*>(p.out) + static_cast<size_t>(float_row(p, r)) * p.ldo + lane;
    float x[kOwn];
    double sum = 0.0, squares = 0.0;
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        x[i] = from[32 * i];
    }
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        sum += static_cast<double>(x[i]);
    }
    const double mean = warp_sum(sum) / kWN;
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        const double d = static_cast<double>(x[i]) - mean;
        squares += d * d;
    }
    const double rstd = 1.0 / sqrt(warp_sum(squares) / kWN + p.eps);
    unsigned char* out = static_cast<unsigned char*>(p.out_k);
    const int line = code_row(p, r);
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        const int c = 32 * i + lane;
        const double z = (static_cast<double>(x[i]) - mean) * rstd;
        const float y = __double2float_rn(z * static_cast<double>(p.weight[c]) + static_cast<double>(p.affine[c]));
        const int code = exact_code(y, p.offset[c], p.step[c], p.low, p.high);
#if OUT_BITS
        const uint32_t high = __ballot_sync(kAll, code & 2), low = __ballot_sync(kAll, code & 1);
        if (lane < 2) {
            *reinterpret_cast<uint32_t*>(out + code_at(line, bit_at(32 * i, lane), p.chunks)) = lane ? high : low;
        }
#else
        out[code_at(line, c, p.chunks)] = static_cast<unsigned char>(code);
#endif
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
    bool close[2] = {false, false};
#pragma unroll
    for (int first = 0; first < kWN; first += kOut) {
        __syncwarp();  // the codes before have gone out
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
#if OUT_BITS
        send_bits(lines, lane, row0, p.m, p.out_k, first, kWN, p.chunks, [&](int row) { return code_row(p, row); });
#else
        send(lines, lane, row0, p.m, [&](int row, int column) -> unsigned char* {
            return static_cast<unsigned char*>(p.out_k) + code_at(code_row(p, row), first + column, p.chunks);
        });
#endif
    }
    __syncwarp();  // all have been sent: what is in doubt is sent again
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int first = row0 + 8 * half;
        uint32_t rows = __ballot_sync(kAll, close[half] && first + lane / 4 < p.m);  // four lanes a row
        while (rows != 0) {
            const int row = (__ffs(rows) - 1) / 4;
            rows &= ~(0xFu << (4 * row));
            codes_again(p, first + row, lane);
        }
    }
}
