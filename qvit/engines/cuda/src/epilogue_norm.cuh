// Floats go out, then the codes of their LayerNorm: a warp has whole rows, kWN is the width of a row (EPILOGUE 3).
#pragma once

#include "residual.cuh"
#include "send_codes.cuh"
#include "staged_rows.cuh"

// The columns' constants, in shared memory: registers for their addresses are few. From standardised values to codes they give
// the codes' range as 0 to 1, where clamping costs nothing.
enum { kScale = 0, kBias = kBN, kGain = 2 * kBN, kShift = 3 * kBN };
constexpr int kConstants = 4 * kBN;

__device__ __forceinline__ void load_constants(const GemmArgs& p, float* to) {
    const float range = p.high - p.low;
    for (int c = threadIdx.x; c < kBN; c += kThreads) {
        to[kScale + c] = W_HALF ? 0.5f * p.scale[c] : p.scale[c];  // half a sum, times the scale, is the same number
        to[kBias + c] = p.bias[c];
        to[kGain + c] = __fdiv_rn(p.inverse[c], range);
        to[kShift + c] = __fdiv_rn(__fsub_rn(p.shift[c], p.low), range);
    }
}

// a b + c, not below 0 and not above 1.
__device__ __forceinline__ float multiply_add_saturated(float a, float b, float c) {
#ifdef QVIT_EMULATION
    return clamp(fmaf(a, b, c), 0.0f, 1.0f);
#else
    float d;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
#endif
}

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

__device__ __forceinline__ void finish(const GemmArgs& p, const Place& of, const Place& next, int lane, const Room& room,
                                       int (&sums)[kRows][kColumns][4]) {
    static_assert(kRows == 1, "a warp holds 16 rows");
    const int row0 = of.row, c0 = 2 * (lane % 4);
    const float* const constants = room.constants + c0;
    unsigned char* const lines = room.lines;
    float y[kColumns][4], total[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
#pragma unroll
    for (int piece = 0; piece < kPieces; piece++) {
        add_up_piece(
            p, of, next, piece, lane, room.slots,
            [&](int j, float(&to)[4]) {
                float scale[2], bias[2];
                load_pair(constants + kScale + 8 * j, scale);
                load_pair(constants + kBias + 8 * j, bias);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    to[e] = __fadd_rn(__fmul_rn(__int2float_rn(sums[0][j][e]), scale[e % 2]), bias[e % 2]);
                }
            },
            [&](int j, const float(&from)[4]) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    y[j][e] = from[e];
                }
                total[0][j % 2] += from[0] + from[1], total[1][j % 2] += from[2] + from[3];
            });
    }
    float mean[2], rstd[2], near[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float squares[2] = {0.0f, 0.0f};
        mean[half] = quad_sum(total[half][0] + total[half][1]) * (1.0f / kWN);
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                y[j][2 * half + e] -= mean[half];
                squares[e] = fmaf(y[j][2 * half + e], y[j][2 * half + e], squares[e]);
            }
        }
        rstd[half] = rsqrtf(quad_sum(squares[0] + squares[1]) * (1.0f / kWN) + static_cast<float>(p.eps));
        near[half] = p.margin * (1.0f + 0.25f * fabsf(mean[half]) * rstd[half]);
    }
    const float range = p.high - p.low, whole = kWhole + p.low;
#if !OUT_BITS && !SCATTER
    // Where 16 codes of a lane go: the first of the warp's rows are in one tile, and so are the eight that follow.
    static_assert(kOut == 64 && kWM == 16, "64 columns of a row are four lanes' 16 bytes");
    unsigned char* sent[2];
#pragma unroll
    for (int odd = 0; odd < 2; odd++) {
        sent[odd] = static_cast<unsigned char*>(p.out_k) + code_at(row0 + lane / 4, 64 * odd + 16 * (lane % 4), p.chunks);
    }
#endif
    float farthest[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};  // from a whole number
#pragma unroll
    for (int first = 0; first < kWN; first += kOut) {
        __syncwarp();  // the codes before have gone out
#pragma unroll
        for (int j = 0; j < kOut / 8; j++) {
            const int c = first + 8 * j;
            float gain[2], shift[2];
            load_pair(constants + kGain + c, gain);
            load_pair(constants + kShift + c, shift);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int code[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float v = multiply_add_saturated(y[first / 8 + j][2 * half + e] * rstd[half], gain[e], shift[e]);
                    const float rounded = fmaf(v, range, whole);  // its last bits are the code's
                    farthest[half][e] = fmaxf(farthest[half][e], fabsf(fmaf(v, range, whole - rounded)));
                    code[e] = __float_as_int(rounded);
                }
                put(lines, 8 * half + lane / 4, 8 * j + c0, code[0], code[1]);
            }
        }
#if OUT_BITS
        send_bits(lines, lane, row0, p.m, p.out_k, first, kWN, p.chunks, [&](int row) { return code_row(p, row); });
#elif SCATTER
        send(lines, lane, row0, p.m, [&](int row, int column) -> unsigned char* {
            return static_cast<unsigned char*>(p.out_k) + code_at(code_row(p, row), first + column, p.chunks);
        });
#else
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (row0 + 8 * half + lane / 4 < p.m) {
                *reinterpret_cast<uint4*>(sent[first / 64 % 2] + first / kChunk * kTileBytes + 8 * half * kChunk) =
                    *reinterpret_cast<const uint4*>(lines + (8 * half + lane / 4) * kLine + 16 * (lane % 4));
            }
        }
#endif
    }
    __syncwarp();  // all have been sent: what is in doubt is sent again
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int first = row0 + 8 * half;
        const bool close = fmaxf(farthest[half][0], farthest[half][1]) > 0.5f - near[half];
        uint32_t rows = __ballot_sync(kAll, close && first + lane / 4 < p.m);  // four lanes a row
        while (rows != 0) {
            const int row = (__ffs(rows) - 1) / 4;
            rows &= ~(0xFu << (4 * row));
            codes_again(p, first + row, lane);
        }
    }
}
