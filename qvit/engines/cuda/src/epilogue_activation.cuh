// The activation, then codes (EPILOGUE 1): by a table a column, CELLS long, or computed where there is none.
#pragma once

#include "send_codes.cuh"

#if CELLS

// Columns are permuted (`slots` in `qvit/engines/cuda/step_tables.py`): a lane's kWN / 4 columns lie next to each other, and its
// codes go out from registers, a group of fragments at a time.
constexpr int kGroup = kColumns < 8 ? kColumns : 8;
static_assert(kWN % 32 == 0 && kColumns % kGroup == 0, "a lane has a multiple of eight codes");

// 128 more or less than a sum's code, in the second byte; `quad`: lane of the quad and 24 zeros behind.
__device__ __forceinline__ uint32_t step_of(int sum, const int4& step, const unsigned char* table, int column, uint32_t quad) {
    const uint32_t w = static_cast<uint32_t>(clamp_sum(sum, step.x, step.y));
    const uint32_t u = w * static_cast<uint32_t>(step.z) + quad;
    uint32_t cell = u >> 24;
    keep(cell);
    const unsigned char* entry = table + static_cast<uint64_t>(cell) * 4 + 2 * (CELLS * (column / 2 * 2) + column % 2);
    return load_constant(reinterpret_cast<const uint16_t*>(entry)) + (u >> 16);
}

// The codes of 2 or 4 fragments that a lane has next to each other in a row.
template <int N>
struct Words {
    uint32_t at[N];
};

__device__ __forceinline__ void store(unsigned char* to, const Words<2>& w) {
    *reinterpret_cast<uint2*>(to) = {w.at[0], w.at[1]};
}
__device__ __forceinline__ void store(unsigned char* to, const Words<4>& w) {
    *reinterpret_cast<uint4*>(to) = {w.at[0], w.at[1], w.at[2], w.at[3]};
}

#if OUT_BITS
__device__ __forceinline__ void store_plane(unsigned char* to, const Words<2>& w, int plane) {
    *to = static_cast<uint8_t>(four_bits(w.at[0], plane) | four_bits(w.at[1], plane) << 4);
}
__device__ __forceinline__ void store_plane(unsigned char* to, const Words<4>& w, int plane) {
    const uint32_t low = four_bits(w.at[0], plane) | four_bits(w.at[1], plane) << 4;
    const uint32_t high = four_bits(w.at[2], plane) | four_bits(w.at[3], plane) << 4;
    *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(low | high << 8);
}
#endif

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char* lines,
                                       int (&sums)[kRows][kColumns][4]) {
    const int t = lane % 4;
    const uint32_t quad = static_cast<uint32_t>(t * CELLS) << 24;
    const int4* steps = p.steps + column0 + 2 * t;
    const unsigned char* table = reinterpret_cast<const unsigned char*>(p.table + column0 * CELLS);
    keep(table);
#pragma unroll
    for (int g = 0; g < kColumns / kGroup; g++) {
        Words<kGroup / 2> words[kRows][2];
#pragma unroll
        for (int q = 0; q < kGroup / 2; q++) {
            const int j = g * kGroup + 2 * q;
            const int4 step[4] = {load_constant(steps + 8 * j), load_constant(steps + 8 * j + 1), load_constant(steps + 8 * j + 8),
                                  load_constant(steps + 8 * j + 9)};
#pragma unroll
            for (int i = 0; i < kRows; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    uint32_t x[4];
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        x[e] = step_of(sums[i][j + e / 2][2 * half + e % 2], step[e], table, 8 * (j + e / 2) + e % 2, quad);
                    }
                    words[i][half].at[q] =
                        __vabsdiffu4(__byte_perm(__byte_perm(x[0], x[1], 0x51), __byte_perm(x[2], x[3], 0x51), 0x5410), 0x80808080u);
                }
            }
        }
        const int c = column0 + t * (kWN / 4) + 2 * kGroup * g;
        if (c < p.n) {
#pragma unroll
            for (int i = 0; i < kRows; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = row0 + 16 * i + 8 * half + lane / 4;
                    if (row < p.m) {
                        unsigned char* out = static_cast<unsigned char*>(p.out);
#if OUT_BITS
                        store_plane(out + code_at(row, bit_at(c, 1), p.ldo), words[i][half], 1);
                        store_plane(out + code_at(row, bit_at(c, 0), p.ldo), words[i][half], 0);
#else
                        store(out + code_at(row, c, p.ldo), words[i][half]);
#endif
                    }
                }
            }
        }
    }
}

#else

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

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char* lines,
                                       int (&sums)[kRows][kColumns][4]) {
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
        const int c = column0 + 8 * j + 2 * (lane % 4);
        float scale[2], bias[2], inverse[2], offset[2];
        load_pair(p.scale + c, scale);
        load_pair(p.bias + c, bias);
        load_pair(p.inverse + c, inverse);
        load_pair(p.offset + c, offset);
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int codes[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    codes[e] = activation_code(p, sums[i][j][2 * half + e], c + e, scale[e], bias[e], inverse[e], offset[e]);
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

#endif
