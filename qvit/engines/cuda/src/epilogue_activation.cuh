// The activation, then codes (EPILOGUE 1): by comparisons (RISING, FALLING) or a table a column, CELLS long, or computed where there
// is neither.
#pragma once

#include "send_codes.cuh"

#if RISING + FALLING

#include "epilogue_compare.cuh"

#elif CELLS

#include "lane_codes.cuh"

// Columns are permuted (`slots` in `qvit/engines/cuda/step_tables.py`): a lane's kWN / 4 columns lie next to each other, and its
// codes go out from registers, a group of fragments at a time. As planes of bits, the two groups take turns: their bits of 2 x 2
// codes a byte end up in the order of the columns.
constexpr int kGroup = OUT_BITS ? kColumns / 2 : kColumns < 8 ? kColumns : 8;
constexpr int kTogether = OUT_BITS ? 2 : OUT_NIBBLES ? kColumns / kGroup : 1;  // groups that go out together
static_assert(kWN % 32 == 0 && kColumns % kGroup == 0 && (!OUT_BITS || kWN >= 64), "a lane has whole words of codes, or of bits");

// What `packed` in `qvit/engines/cuda/step_tables.py` makes of kWN columns: factors and addends, then tables of eight columns each.
constexpr int kNumberBytes = 8 * kWN, kColumnBytes = kNumberBytes + 2 * kWN * CELLS;

// The tables that lane `t` of a quad reads.
template <bool kStaged>
struct Tables {
    const uint16_t* at;

    __device__ __forceinline__ Tables(const unsigned char* columns, int t)
        : at(reinterpret_cast<const uint16_t*>(columns + kNumberBytes) + 2 * t) {}
    __device__ __forceinline__ uint32_t entry(uint32_t cell, int fragment, int second) const {
        return load_constant(at + 8 * cell + fragment * 8 * CELLS + second);
    }
};

#ifndef QVIT_EMULATION
// In shared memory. The compiler is kept from adding base and fragment first, which would take a register and an addition each.
template <>
struct Tables<true> {
    uint32_t at;

    __device__ __forceinline__ Tables(const unsigned char* columns, int t) : at(shared_address(columns) + kNumberBytes + 4 * t) {}
    __device__ __forceinline__ uint32_t entry(uint32_t cell, int fragment, int second) const {
        asm("" : "+r"(cell));
        uint32_t address = at + 16 * cell;
        asm("" : "+r"(address));
        uint16_t found;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(found) : "r"(address + fragment * 16 * CELLS + 2 * second));
        return found;
    }
};
#endif

// 128 more or less than a sum's code, in the third byte.
template <bool kStaged>
__device__ __forceinline__ uint32_t step_of(int sum, int factor, int add, const Tables<kStaged>& tables, int fragment, int second) {
    const uint32_t x = static_cast<uint32_t>(sum) * static_cast<uint32_t>(factor) + static_cast<uint32_t>(add);
    const uint32_t u = static_cast<uint32_t>(clamp_sum(static_cast<int>(x), 0, (CELLS << 16) - 1));
    return (tables.entry(u >> 16, fragment, second) << 8) + u;
}

// Four codes from what `step_of` gives.
__device__ __forceinline__ uint32_t codes_of(const uint32_t (&x)[4]) {
    return __vabsdiffu4(__byte_perm(__byte_perm(x[0], x[1], 0x62), __byte_perm(x[2], x[3], 0x62), 0x5410), 0x80808080u);
}

// Codes of kGroup fragments that a lane has next to each other in a row.
struct Words {
    uint32_t at[kGroup / 2];
};

#if OUT_BITS
// A plane's bits, in whole bytes where they are four a byte.
__device__ __forceinline__ uint32_t whole_bytes(uint32_t bits) { return kWN / 4 == 32 ? bits : bits | bits >> 4; }

__device__ __forceinline__ void store(const Out& out, int row, int half, int first, const Words (&groups)[2]) {
    uint32_t codes[2] = {};
#pragma unroll
    for (int g = 0; g < 2; g++) {
#pragma unroll
        for (int q = 0; q < kGroup / 2; q++) {
            codes[g] += groups[g].at[q] << (2 * q);
        }
    }
    store_plane(out.at(row, half, bit_at(0, 1)), whole_bytes(plane_of(codes[0] >> 1, codes[1])));
    store_plane(out.at(row, half, bit_at(0, 0)), whole_bytes(plane_of(codes[0], codes[1] << 1)));
}
#elif OUT_NIBBLES
// Codes two a byte, of all of a lane's groups: of eight neighbours the last four above the first four.
__device__ __forceinline__ void store(const Out& out, int row, int half, int, const Words (&groups)[kTogether]) {
    constexpr int kWords = kTogether * kGroup / 4;
    static_assert(kWords == 4 || kWords == 2 || kWords == 1, "a lane's codes leave at once");
    uint32_t pairs[kWords];
#pragma unroll
    for (int i = 0; i < kWords; i++) {
        const Words& of = groups[i / (kGroup / 4)];
        const int q = 2 * (i % (kGroup / 4));
        pairs[i] = of.at[q] + (of.at[q + 1] << 4);
    }
    unsigned char* const to = out.at(row, half, 0);
    if constexpr (kWords == 4) {
        *reinterpret_cast<uint4*>(to) = {pairs[0], pairs[1 % kWords], pairs[2 % kWords], pairs[kWords - 1]};
    } else if constexpr (kWords == 2) {
        *reinterpret_cast<uint2*>(to) = {pairs[0], pairs[kWords - 1]};
    } else {
        *reinterpret_cast<uint32_t*>(to) = pairs[0];
    }
}
#else
__device__ __forceinline__ void store(const Out& out, int row, int half, int first, const Words (&groups)[1]) {
    unsigned char* to = out.at(row, half, 2 * kGroup * first);
    if constexpr (kGroup == 8) {
        *reinterpret_cast<uint4*>(to) = {groups[0].at[0], groups[0].at[1], groups[0].at[2], groups[0].at[3]};
    } else {
        *reinterpret_cast<uint2*>(to) = {groups[0].at[0], groups[0].at[1]};
    }
}
#endif

// `columns`: what is known of them, in shared memory where kStaged.
template <bool kStaged>
__device__ __forceinline__ void finish_columns(const GemmArgs& p, int row0, int column0, int lane, const unsigned char* columns,
                                               int (&sums)[kRows][kColumns][4]) {
    const int t = lane % 4;
    const Out out(p, row0, column0, lane);
    const int4* numbers = reinterpret_cast<const int4*>(columns) + t;
    const Tables<kStaged> tables(columns, t);
#pragma unroll
    for (int first = 0; first < kColumns / kGroup; first += kTogether) {
        Words words[kRows][2][kTogether];
#pragma unroll
        for (int g = 0; g < kTogether; g++) {
#pragma unroll
            for (int q = 0; q < kGroup / 2; q++) {
                const int j = (first + g) * kGroup + 2 * q;
                const int4 number[2] = {read_column<kStaged>(numbers + 4 * j), read_column<kStaged>(numbers + 4 * j + 4)};
                const int factor[4] = {number[0].x, number[0].z, number[1].x, number[1].z};
                const int add[4] = {number[0].y, number[0].w, number[1].y, number[1].w};
#pragma unroll
                for (int i = 0; i < kRows; i++) {
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        uint32_t x[4];
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            x[e] = step_of<kStaged>(sums[i][j + e / 2][2 * half + e % 2], factor[e], add[e], tables,
                                                    j + e / 2, e % 2);
                        }
                        words[i][half][g].at[q] = codes_of(x);
                    }
                }
            }
        }
        if (column0 + t * (kWN / 4) + 2 * kGroup * first < p.n) {
#pragma unroll
            for (int i = 0; i < kRows; i++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    if (row0 + 16 * i + 8 * half + lane / 4 < p.m) {
                        store(out, i, half, first, words[i][half]);
                    }
                }
            }
        }
    }
}

__device__ __forceinline__ const unsigned char* columns_of(const GemmArgs& p, int column0) {
    return p.table + column0 / kWN * kColumnBytes;
}

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char* lines,
                                       int (&sums)[kRows][kColumns][4]) {
    finish_columns<false>(p, row0, column0, lane, columns_of(p, column0), sums);
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
