// Floats go out, then the codes of their LayerNorm: a warp has whole rows, kWN is the width of a row (EPILOGUE 3).
#pragma once

#include "moments.cuh"
#include "residual.cuh"
#include "send_codes.cuh"
#include "whole_rows.cuh"

// From standardised values to codes the columns' constants give the codes' range as 0 to 1, where clamping costs nothing.
enum { kGain = kOfOutput, kShift = kOfOutput + kBN };
constexpr int kConstants = kOfOutput + 2 * kBN;

__device__ __forceinline__ void load_constants(const GemmArgs& p, float* to) {
    load_output_constants(p, to);
    const float range = p.high - p.low;
    for (int c = threadIdx.x; c < kBN; c += kThreads) {
        to[kGain + c] = __fdiv_rn(p.inverse[c], range);
        to[kShift + c] = __fdiv_rn(__fsub_rn(p.shift[c], p.low), range);
    }
}

// False, which the compiler does not know. A loop that ends with it holds instructions of before and after apart: without, sums
// wait for their stores in registers that are not there.
__device__ __forceinline__ bool is_never(const GemmArgs& p) { return p.m < 0; }

// The codes of row r, as they are defined: the whole warp together, from the floats that it has just written, so that nothing is
// held in registers for a case that is rare. All that it reads is on its way before anything is used.
__device__ __noinline__ inline void codes_again(const GemmArgs& p, int r, int lane) {
    constexpr int kOwn = kWN / 32;  // columns a lane
    const Stream* const from = static_cast<const Stream*>(p.out) + static_cast<size_t>(float_row(p, r)) * LDO + lane;
    const float *const weights = p.weight + lane, *const affines = p.affine + lane, *const offsets = p.offset + lane;
    const float* const steps = p.step + lane;
    const float low = p.low, high = p.high;
    const double eps = p.eps;
    unsigned char* const out = static_cast<unsigned char*>(p.out_k);
    const int line = code_row(p, r), chunks = p.chunks;
    float x[kOwn], weight[kOwn], added[kOwn], offset[kOwn], step[kOwn];
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        x[i] = value_of(from[32 * i]);
    }
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        weight[i] = load_constant(weights + 32 * i), added[i] = load_constant(affines + 32 * i);
        offset[i] = load_constant(offsets + 32 * i), step[i] = load_constant(steps + 32 * i);
    }
    const Moments of = exact_moments<kWN>(x, eps, [](int) { return true; });
#pragma unroll
    for (int i = 0; i < kOwn; i++) {
        const int c = 32 * i + lane;
        const double z = (static_cast<double>(x[i]) - of.mean) * of.rstd;
        const float y = __double2float_rn(z * static_cast<double>(weight[i]) + static_cast<double>(added[i]));
        const int code = exact_code(y, offset[i], step[i], low, high);
#if OUT_BITS
        const uint32_t upper = __ballot_sync(kAll, code & 2), lower = __ballot_sync(kAll, code & 1);
        if (lane < 2) {
            *reinterpret_cast<uint32_t*>(out + code_at(line, bit_at(32 * i, lane), chunks)) = lane ? upper : lower;
        }
#else
        out[code_at(line, c, chunks)] = static_cast<unsigned char>(code);
#endif
    }
}

__device__ __forceinline__ void finish(const GemmArgs& p, Part& part, int lane, unsigned char* lines, const float* of_columns,
                                       int (&sums)[kRows][kColumns][4]) {
    static_assert(kRows == 1, "a warp holds 16 rows");
    const int row0 = part.row - lane / 4, c0 = 4 * (lane % 4);
    const float* const constants = of_columns + c0;
    float y[kUnitsOfTile][4], total[2][2] = {{0.0f, 0.0f}, {0.0f, 0.0f}};
    add_up_tile(p, part, lane, constants, sums, [&](int unit, const float(&from)[4]) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            y[unit][e] = from[e];
        }
        total[unit % 2][0] += from[0] + from[1], total[unit % 2][1] += from[2] + from[3];
    });
    float mean[2], rstd[2], near[2];
    do {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float squares[2] = {0.0f, 0.0f};
            mean[half] = quad_sum(total[half][0] + total[half][1]) * (1.0f / kWN);
#pragma unroll
            for (int unit = half; unit < kUnitsOfTile; unit += 2) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    y[unit][e] -= mean[half];
                    squares[e % 2] = fmaf(y[unit][e], y[unit][e], squares[e % 2]);
                }
            }
            rstd[half] = rsqrtf(quad_sum(squares[0] + squares[1]) * (1.0f / kWN) + static_cast<float>(p.eps));
            near[half] = p.margin * (1.0f + 0.25f * fabsf(mean[half]) * rstd[half]);
        }
    } while (is_never(p));
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
        do {
#pragma unroll
            for (int i = 0; i < kOut / 16; i++) {
                float gain[4], shift[4];
                load_quad(constants + kGain + first + 16 * i, gain);
                load_quad(constants + kShift + first + 16 * i, shift);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    uint32_t code[4];
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const float v = multiply_add_saturated(y[first / 8 + 2 * i + half][e] * rstd[half], gain[e], shift[e]);
                        const float rounded = fmaf(v, range, whole);  // its last bits are the code's
                        farthest[half][e % 2] = fmaxf(farthest[half][e % 2], fabsf(fmaf(v, range, whole - rounded)));
                        code[e] = static_cast<uint32_t>(__float_as_int(rounded));
                    }
                    *reinterpret_cast<uint32_t*>(lines + (8 * half + lane / 4) * kLine + 16 * i + c0) =
                        __byte_perm(__byte_perm(code[0], code[1], 0x40), __byte_perm(code[2], code[3], 0x40), 0x5410);
                }
            }
        } while (is_never(p));
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
