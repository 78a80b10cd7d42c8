// Softmax of 16 queries by two warps, each with half of the keys, so that there is room in registers for more warps. They exchange
// their totals of the rows, then sums of values: of 8 queries each.
//
// The first warp has one or a few more keys, takes the tiles, and does what is lost alone; the second one has its halves of 8
// queries exchanged, so that each warp keeps the sums of its first half and gives away those of its second one.
#pragma once

#include "attention_once.cuh"
#include "attention_stages.cuh"

constexpr int kPairSums = kColumns * 512 + 128;           // bytes that a warp gives to the other: sums of a row, sums of the map's codes
constexpr int kPairBytes = 2 * kPairSums + 2 * 64 + 16;   // and totals, and the next tile
constexpr int kPairsAt = (kGainsAt + kGainBytes + 24 * RING + 4 + 15) / 16 * 16;

#ifdef QVIT_EMULATION
inline void meet_pair(int pair) {
    static int arrived[16];
    static long turns[16];
    const long turn = turns[pair];
    if (++arrived[pair] == 64) {
        arrived[pair] = 0;
        turns[pair]++;
    }
    while (turns[pair] == turn) {
        emulation::yield();
    }
}
#else
// Both warps of a pair: what each wrote to shared memory before is seen by the other.
__device__ __forceinline__ void meet_pair(int pair) { asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory"); }
#endif

template <class Heads>
struct Pair {
    const Heads& stages;
    const Rows& rows;
    const Once once;
    unsigned char* memory;  // of this pair
    int side;

    static_assert(ROW_CHECK && WARPS % 2 == 0 && WARPS <= 30 && kPairs > 4);
    static constexpr int kEach = (kPairs - 1) / 4 * 2;  // pairs of tiles of keys that both warps have; none has the last key
    static constexpr int kRest = kPairs - 2 * kEach, kMine = kEach + kRest;  // the first warp has the last ones, too

    __device__ __forceinline__ int4* sums(int of, int j) const {
        return reinterpret_cast<int4*>(memory + of * kPairSums + 512 * j + 16 * rows.lane);
    }
    __device__ __forceinline__ int* row_sum(int of) const {
        return reinterpret_cast<int*>(memory + of * kPairSums + 512 * kColumns + 4 * rows.lane);
    }
    __device__ __forceinline__ float* total(int of, int half) const {
        return reinterpret_cast<float*>(memory + 2 * kPairSums + 64 * of) + rows.lane / 4 + 8 * (half ^ side);
    }
    __device__ __forceinline__ int* next() const { return reinterpret_cast<int*>(memory + 2 * kPairSums + 2 * 64); }
    __device__ __forceinline__ void meet() const {
        __syncwarp();  // the barrier counts whole warps
        meet_pair(static_cast<int>(threadIdx.x / 64));
    }

    // The exponentials of a warp's keys, and their totals of two rows.
    __device__ __forceinline__ void exponentials(float (&e)[kMine][2][4], float (&totals)[2]) const {
        uint32_t q[kSteps][4];
        once.queries(q);
        float some[2][2] = {};  // of rows, even and odd pairs
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            int s[2][4];
            scores_of(q, rows.head, side * kEach + i, rows.lane, s);
#pragma unroll
            for (int n = 0; n < 8; n++) {
                e[i][n / 4][n % 4] = once.exponential(__int_as_float(s[n / 4][n % 4]));
            }
            once.add(e[i], true, i, some);
        }
        if (side == 0) {
#pragma unroll
            for (int i = kEach; i < kMine; i++) {
                once.exponentials(q, kEach + i, e[i]);
                once.add(e[i], 16 * (kEach + i) + 8 < TOKENS, i, some);
            }
        } else {
#pragma unroll
            for (int i = 8 * kEach; i < 8 * kMine; i++) {
                e[i / 8][i / 4 % 2][i % 4] = 0.0f;
            }
        }
        totals[0] = quad_sum(some[0][0] + some[0][1]);
        totals[1] = quad_sum(some[1][0] + some[1][1]);
    }

    // A tile of head n; the next one that the pair has.
    __device__ __forceinline__ int run(int n) const {
        float e[kMine][2][4], totals[2];
        exponentials(e, totals);
        if (rows.lane % 4 == 0) {
            *total(side, 0) = totals[0];
            *total(side, 1) = totals[1];
        }
        if (side == 0 && rows.lane == 0) {
            *next() = stages.take();
        }
        // What is read between this meeting and the next one is not written before that is over, and the other way round.
        meet();
        const int tile = *next();
        const Once::Row of[2] = {once.row(totals[0] + *total(1 - side, 0)), once.row(totals[1] + *total(1 - side, 1))};
        const bool lost = of[0].lost || of[1].lost;  // in both warps, who have the same totals
        const unsigned suspects = once.suspects_of(of);
        if (__any_sync(kAll, suspects != 0 || lost)) {
            if (__any_sync(kAll, lost)) {
                if (side == 0) {
                    const Head copy = rows.head;  // its address is given away, that of the other one is not
                    thrice(rows.p, copy, rows.query0);
                }
                stages.leave(n);
                meet();
                return tile;
            }
            once.settle(of, suspects, e);
        }
        Values values;
        values.clear();
        bool none = false;
        MapWords words[kMine + 1];
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            words[i] = once.words_of(e[i], of, true, none);
            if (i % 2) {
                values.add(words[i - 1], words[i], rows, side * (kEach / 2) + i / 2);
            }
        }
        if (side == 0) {
            words[kMine] = {0u, 0u};
#pragma unroll
            for (int i = kEach; i < kMine; i++) {
                words[i] = once.words_of(e[i], of, 2 * (kEach + i) + 1 < Once::kTiles, none);
            }
#pragma unroll
            for (int i = kEach; i < kMine; i += 2) {
                values.add(words[i], words[i + 1], rows, (kEach + i) / 2);
            }
        }
        stages.leave(n);
#if SHOW
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            if (i < kEach || side == 0) {
                rows.show((i < kEach ? side * kEach : kEach) + i, words[i]);
            }
        }
#endif
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
            values.give(sums(side, j), j, 1);
        }
        if (V_OFFSET != 0) {
            *row_sum(side) = values.row_sums[2];
        }
        meet();
        int s[kColumns][4], row = values.row_sums[0] + (V_OFFSET != 0 ? *row_sum(1 - side) : 0);
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[j][i] = values.sum(j, 0, i);
            }
            Values::add_given(s[j], *sums(1 - side, j));
        }
        Values::finish_row<0, kColumns>(rows, 0, s, row);
        return tile;
    }
};
