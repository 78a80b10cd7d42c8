// Two-bit codes behind an activation by comparisons of whole sums with RISING + FALLING thresholds a column, two columns at a time
// (`qvit/engines/cuda/comparisons.py`): three or four instructions a sum, and of shared memory nothing but thresholds.
#pragma once

#include "lane_codes.cuh"

// Columns are permuted (`slots` there): the codes of a lane's two groups of fragments end up in a register each, those of every first
// column in its lower half and those of every second one in the higher half.
constexpr int kCompared = RISING + FALLING, kGroup = kColumns / 2;
constexpr int kTogether = 4;  // fragments whose thresholds are read at once
static_assert(OUT_BITS && kTogether * kCompared <= 16 && kGroup % kTogether == 0 && kGroup <= 8, "codes of a group fit a register");

// What `packed` there makes of kWN columns.
constexpr int kColumnBytes = 2 * kCompared * kWN;

// In each half 1 where the sum has passed the threshold, of which `add` has one less.
__device__ __forceinline__ uint32_t passed(uint32_t sums, uint32_t add) { return __viaddmin_s16x2_relu(sums, add, 0x00010001u); }

// Two columns' codes, less FALLING.
__device__ __forceinline__ uint32_t steps_of(uint32_t sums, const uint32_t (&add)[kCompared]) {
    uint32_t up = 0, down = 0;
#pragma unroll
    for (int i = 0; i < RISING; i++) {
        up += passed(sums, add[i]);
    }
#pragma unroll
    for (int i = RISING; i < kCompared; i++) {
        down += passed(sums, add[i]);
    }
    return up - down;
}

// `columns`: what is known of them, in shared memory where kStaged.
template <bool kStaged>
__device__ __forceinline__ void finish_columns(const GemmArgs& p, int row0, int column0, int lane, const unsigned char* columns,
                                               int (&sums)[kRows][kColumns][4]) {
    const int t = lane % 4;
    const Out out(p, row0, column0, lane);
    const int4* const thresholds = reinterpret_cast<const int4*>(columns) + t;
    uint32_t codes[kRows][2][2];
#pragma unroll
    for (int j = 0; j < kColumns; j += kTogether) {
        uint32_t add[kTogether][kCompared];
#pragma unroll
        for (int i = 0; i < kCompared; i++) {
            const int4 four = read_column<kStaged>(thresholds + 4 * (j / kTogether * kCompared + i));
            add[0][i] = four.x, add[1][i] = four.y, add[2][i] = four.z, add[3][i] = four.w;
        }
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint32_t& group = codes[i][half][j / kGroup];
                // Sums of halves, some of which are below zero for a while: they add up to codes, and nothing is carried then.
                group = j % kGroup == 0 ? FALLING * (kGroup == 8 ? 0x55555555u : 0x00550055u) : group;
#pragma unroll
                for (int q = 0; q < kTogether; q++) {
                    const int(&two)[4] = sums[i][j + q];
                    const uint32_t pair = __byte_perm(two[2 * half], two[2 * half + 1], 0x5410);
                    group += steps_of(pair, add[q]) << (2 * (j % kGroup + q));
                }
            }
        }
    }
    if (column0 + t * (kWN / 4) < p.n) {
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (row0 + 16 * i + 8 * half + lane / 4 < p.m) {
                    const uint32_t(&both)[2] = codes[i][half];
                    store_plane(out.at(i, half, bit_at(0, 1)), plane_of(both[0] >> 1, both[1]));
                    store_plane(out.at(i, half, bit_at(0, 0)), plane_of(both[0], both[1] << 1));
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
