// The second product of attention, codes of the map with values, and the codes of proj's input that follow.
#pragma once

#include "attention_rows.cuh"

struct Values {
    // Of pieces of 16 channels: sums of even ones, then of odd ones; lane t of a quad has 4t, 4t + 2 and 4t + 1, 4t + 3.
    int sums[kColumns][2][4];
    int row_sums[2];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sums[j][i / 4][i % 4] = 0;
            }
        }
        row_sums[0] = row_sums[1] = 0;
    }

    // The step over 32 keys.
    __device__ __forceinline__ void add(const MapWords& first, const MapWords& second, const Rows& rows, int group) {
        const uint32_t a[4] = {first.row, first.row8, second.row, second.row8};
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
            const uint4 b = *reinterpret_cast<const uint4*>(rows.head.values + (group * kColumns + j) * kValuePiece + 16 * rows.lane);
            const uint32_t even[2] = {b.x, b.y}, odd[2] = {b.z, b.w};
            if constexpr (V_SIGNED) {
                multiply<false>(sums[j][0], a, even);
                multiply<false>(sums[j][1], a, odd);
            } else {
                multiply_unsigned(sums[j][0], a, even);
                multiply_unsigned(sums[j][1], a, odd);
            }
        }
        if (V_OFFSET != 0) {
            row_sums[0] += byte_sum(a[0]) + byte_sum(a[2]);
            row_sums[1] += byte_sum(a[1]) + byte_sum(a[3]);
        }
    }

    __device__ __forceinline__ static int byte_sum(uint32_t word) {
#ifdef QVIT_EMULATION
        return byte_product<uint8_t, uint8_t>(word, 0x01010101u);
#else
        return static_cast<int>(__dp4a(word, 0x01010101u, 0u));
#endif
    }

    // y of one output channel, in the reference engine's roundings.
    __device__ __forceinline__ static float value_of(int sum, int row_sum, float scale, float row_scale) {
        if (V_OFFSET == 1) {
            return __fmul_rn(0.5f * __int2float_rn(2 * sum + row_sum), scale);
        }
        const float y = __fmul_rn(__int2float_rn(sum), scale);
        return V_OFFSET == 2 ? __fadd_rn(y, __fmul_rn(__int2float_rn(row_sum), row_scale)) : y;
    }

    // Codes of the values of both rows, written.
    __device__ __forceinline__ void finish(const Rows& rows) {
        const AttentionArgs& p = rows.p;
        if (V_OFFSET != 0) {
            row_sums[0] = quad_sum(row_sums[0]);
            row_sums[1] = quad_sum(row_sums[1]);
        }
        uint32_t words[2][kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
            const int c = rows.head.index * HEAD_DIM + 16 * j + 4 * (rows.lane % 4);
            const float4 scale = four(p.value_scale, c), row_scale = V_OFFSET == 2 ? four(p.value_row, c) : scale;
            const float4 offset = four(p.offset, c), inverse = four(p.inverse, c);
            const float scales[4] = {scale.x, scale.y, scale.z, scale.w};
            const float row_scales[4] = {row_scale.x, row_scale.y, row_scale.z, row_scale.w};
            const float offsets[4] = {offset.x, offset.y, offset.z, offset.w};
            const float inverses[4] = {inverse.x, inverse.y, inverse.z, inverse.w};
            // The product with the inverse is within two units of the last place of the quotient.
            const float edge = 0.5f - 3e-7f * (1.0f + p.high - p.low);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int codes[4];
                float y[4];
                bool close = false;
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    y[e] = value_of(sums[j][e % 2][2 * half + e / 2], row_sums[half], scales[e], row_scales[e]);
                    const float v = clamp(__fmul_rn(__fsub_rn(y[e], offsets[e]), inverses[e]), p.low, p.high);
                    const float whole = v + kWhole;
                    close |= fabsf(v - (whole - kWhole)) > edge;
                    codes[e] = __float_as_int(whole);  // a low byte is all that is used
                }
                words[half][j] = pack(codes[0], codes[1], codes[2], codes[3]);
                if (close) {
                    words[half][j] = again(p, c, y[0], y[1], y[2], y[3]);
                }
            }
        }
        write(rows, words);
    }

    __device__ __forceinline__ static float4 four(const float* from, int c) { return *reinterpret_cast<const float4*>(from + c); }

    // Four codes as they are defined.
    __device__ __noinline__ static uint32_t again(const AttentionArgs& p, int c, float y0, float y1, float y2, float y3) {
        const float y[4] = {y0, y1, y2, y3};
        int codes[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            codes[e] = exact_code(y[e], p.offset[c + e], p.step[c + e], p.low, p.high);
        }
        return pack(codes[0], codes[1], codes[2], codes[3]);
    }

#if OUT_BITS
    // Both rows of codes as words of bits; of each word a lane of a quad has eight bits.
    __device__ __forceinline__ static void write(const Rows& rows, const uint32_t (&words)[2][kColumns]) {
        const int t = rows.lane % 4;
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int w = 0; w < HEAD_DIM / 32; w++) {
#pragma unroll
                for (int plane = 0; plane < 2; plane++) {
                    uint32_t bits = four_bits(words[half][2 * w], plane) << (4 * t);
                    bits |= four_bits(words[half][2 * w + 1], plane) << (16 + 4 * t);
                    bits |= __shfl_xor_sync(kAll, bits, 1);
                    bits |= __shfl_xor_sync(kAll, bits, 2);
                    if (rows.query(half) < TOKENS && t == 2 * (w % 2) + plane) {
                        const int row = rows.head.image * TOKENS + rows.query(half);
                        const int column = bit_at(rows.head.index * HEAD_DIM + 32 * w, plane);
                        *reinterpret_cast<uint32_t*>(rows.p.out + code_at(row, column, rows.p.ldo)) = bits;
                    }
                }
            }
        }
    }
#else
    __device__ __forceinline__ static void write(const Rows& rows, const uint32_t (&words)[2][kColumns]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (rows.query(half) < TOKENS) {
                const int row = rows.head.image * TOKENS + rows.query(half);
#pragma unroll
                for (int j = 0; j < kColumns; j++) {
                    const int column = rows.head.index * HEAD_DIM + 16 * j + 4 * (rows.lane % 4);
                    *reinterpret_cast<uint32_t*>(rows.p.out + code_at(row, column, rows.p.ldo)) = words[half][j];
                }
            }
        }
    }
#endif
};
