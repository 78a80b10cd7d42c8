// Attention of few heads, or of few queries of many: a block has 16 queries of a head, and each of its warps 32 of the keys, so
// that all of a multiprocessor's schedulers work on what one warp would do alone. Warps exchange their totals of the rows, then
// their sums of values.
//
// Every warp adds the totals in the same order and so has the same numbers of a row. As many roundings as in `Once` go into them.
#pragma once

#include "attention_once.cuh"

struct Split {
    const AttentionArgs& p;
    unsigned char* memory;
    const Rows& rows;
    int warp, lane;

    static_assert(WARPS == kGroups && !BIAS && !LONG);
    static constexpr int kSumsAt = kGainsAt + kGainBytes;                // [WARPS, kColumns, 2] of the lanes' 16 bytes
    static constexpr int kRowSumsAt = kSumsAt + WARPS * kColumns * 1024;  // [WARPS, 2] of the lanes' words
    static constexpr int kParts = HEAD_DIM / 16;                          // of the result: half the rows, 32 channels

    __device__ __forceinline__ float* totals() const { return reinterpret_cast<float*>(memory + kTotalsAt); }
    __device__ __forceinline__ unsigned* flags(int what) const {
        return reinterpret_cast<unsigned*>(memory + kFlagsAt) + what * WARPS;
    }
    __device__ __forceinline__ double* exact(int quad) const {
        return reinterpret_cast<double*>(memory + kExactAt) + quad * WARPS;
    }
    // What any of the warps has told.
    __device__ __forceinline__ unsigned told(int what) const {
        unsigned all = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            all |= flags(what)[w];
        }
        return all;
    }
    __device__ __forceinline__ int4* sums(int of_warp, int j, int half) const {
        return reinterpret_cast<int4*>(memory + kSumsAt) + ((of_warp * kColumns + j) * 2 + half) * 32 + lane;
    }
    __device__ __forceinline__ int* row_sum(int of_warp, int half) const {
        return reinterpret_cast<int*>(memory + kRowSumsAt) + (of_warp * 2 + half) * 32 + lane;
    }

    // Constants come, for which nothing has to be waited for.
    __device__ __forceinline__ void begin() const {
        constexpr int kPieces = HEAD_DIM / 4;
#pragma unroll 1
        for (int i = threadIdx.x; i < 3 * kPieces; i += kThreads) {
            const float* const from = i < kPieces ? p.gain : i < 2 * kPieces ? p.shift : p.row_gain;
            copy_async(memory + kGainsAt + 16 * i, from + rows.head.index * HEAD_DIM + 4 * (i % kPieces), true);
        }
    }

    // A warp's own keys and values begin to come. It alone reads them before all have met.
    __device__ __forceinline__ void load() const {
        const size_t first = rows.head.first * HEAD_DIM;
        const int from = 32 * warp * HEAD_DIM + 16 * lane, to = min(TOKENS, 32 * warp + 32) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < 32 * HEAD_DIM; i += 512) {
            if (from + i < to) {
                copy_async(rows.head.keys + from + i, p.k + first + from + i, true);
            }
        }
        copies_end_group();
#pragma unroll
        for (int i = 0; i < 32 * HEAD_DIM; i += 512) {
            if (from + i < to) {
                copy_async(rows.head.values + from + i, p.v + first + from + i, true);
            }
        }
        copies_end_group();
    }

    // Exponentials of a warp's keys and, for all, their totals.
    __device__ __forceinline__ void exponentials(const Once& once, const uint32_t (&q)[kSteps][4], float (&e)[2][2][4]) const {
        copies_wait<1>();
        __syncwarp();  // all lanes' keys are there
        if (kKeySums) {
            sum_keys(rows.head, warp, lane);
            __syncwarp();
        }
        float total[2][2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int pair = 2 * warp + i;
            int s[2][4];
            scores_of(q, rows.head, pair, lane, s);
#pragma unroll
            for (int n = 0; n < 8; n++) {
                e[i][n / 4][n % 4] = once.exponential(__int_as_float(s[n / 4][n % 4]));
            }
            if (16 * pair + 16 > TOKENS) {
#pragma unroll
                for (int n = 0; n < 8; n++) {
                    const int key = 16 * pair + n / 4 * 8 + 2 * (lane % 4) + n % 2;
                    e[i][n / 4][n % 4] = key < TOKENS ? e[i][n / 4][n % 4] : 0.0f;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                total[i][half] = (e[i][0][2 * half] + e[i][0][2 * half + 1]) + (e[i][1][2 * half] + e[i][1][2 * half + 1]);
            }
        }
        const float first = quad_sum(total[0][0] + total[1][0]), second = quad_sum(total[0][1] + total[1][1]);
        if (lane % 4 == 0) {
            totals()[16 * warp + lane / 4] = first;
            totals()[16 * warp + lane / 4 + 8] = second;
        }
    }

    // The total of one of a lane's two rows.
    __device__ __forceinline__ float total(int half) const {
        float sum = totals()[lane / 4 + 8 * half];
#pragma unroll
        for (int w = 1; w < WARPS; w++) {
            sum += totals()[16 * w + lane / 4 + 8 * half];
        }
        return sum;
    }

#if ROW_CHECK
    // `Once::settle` by all warps, who have the same rows and so the same suspects: where one has found a key, each computes exactly
    // what its own keys add to the row's total.
    __device__ __forceinline__ void settle(
        const Once& once, const Once::Row (&of)[2], unsigned suspects, float (&e)[2][2][4]) const {
        unsigned lanes;
#pragma unroll 1
        for (int turn = 1; (lanes = __ballot_sync(kAll, suspects != 0)) != 0; turn = 3 - turn) {
            const Once::Doubt about = once.doubt(of, suspects, lanes);
            const unsigned found = __ballot_sync(kAll, Once::has(e, about));
            if (lane == 0) {
                flags(turn)[warp] = found;  // those of the turn before are still read by others
            }
            __syncthreads();
            const unsigned all = told(turn);
#pragma unroll 1
            for (unsigned left = all; left; left &= ~(15u << (first_bit(left) & ~3))) {
                const int one = first_bit(left), s = __shfl_sync(kAll, __float_as_int(about.score) - kWholeBits, one);
                const int query = rows.query_of(one, __shfl_sync(kAll, about.half, one));
                const double part = warp_sum(once.exact_ratio(s, rows.q_of(query), query, 32 * warp + lane));
                if (lane == 0) {
                    exact(one / 4)[warp] = part;
                }
            }
            if (all) {
                __syncthreads();
                if (all >> (lane & ~3) & 15) {
                    double total = 0.0;
#pragma unroll
                    for (int w = 0; w < WARPS; w++) {
                        total += exact(lane / 4)[w];
                    }
                    Once::replace(e, about, once.code_of_total(total));
                }
            }
            if (about.leads) {
                suspects &= suspects - 1;
            }
        }
    }
#endif

    // The map's codes of a warp's keys; false if some are to be computed by `Thrice`.
    __device__ __forceinline__ bool codes(const Once& once, float (&e)[2][2][4], MapWords (&words)[2]) const {
        const Once::Row of[2] = {once.row(total(0), total(0)), once.row(total(1), total(1))};
        bool lost = of[0].lost || of[1].lost;
#if ROW_CHECK
        const unsigned suspects = once.suspects_of(of);
        if (__any_sync(kAll, suspects != 0 || lost)) {
            if (__any_sync(kAll, lost)) {
                return false;
            }
            settle(once, of, suspects, e);
        }
#endif
        words[0] = once.words_of(e[0], of, true, lost);
        words[1] = once.words_of(e[1], of, true, lost);
        return ROW_CHECK || !__any_sync(kAll, lost);
    }

    // A warp's sums of values, for all.
    __device__ __forceinline__ void give(const Values& values) const {
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                values.give(sums(warp, j, half), j, half);
            }
        }
        if (V_OFFSET != 0) {
            *row_sum(warp, 0) = values.row_sums[0];
            *row_sum(warp, 1) = values.row_sums[2];
        }
    }

    // Codes of one of a lane's two rows and 32 channels, written.
    template <int kFirst>
    __device__ __forceinline__ void finish(int half) const {
        int row = 0, s[2][4] = {};
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                Values::add_given(s[i], *sums(w, kFirst + i, half));
            }
            row += V_OFFSET != 0 ? *row_sum(w, half) : 0;
        }
        Values::finish_row<kFirst, 2>(rows, half, s, row);
    }

    // All that a block does; false where the warp asked is to do it by `Thrice`.
    __device__ __forceinline__ bool run() const {
        uint32_t q[kSteps][4];
        load();
        rows.load_q(q);
        const Once once = Once::of(rows);
        float e[2][2][4];
        exponentials(once, q, e);
        copies_wait<0>();
        __syncwarp();  // all lanes' values are there
        turn<kColumns>(rows.head.values + 32 * warp * HEAD_DIM);
        __syncthreads();  // totals, keys and values of all are there, and so are the constants
        MapWords words[2] = {{0u, 0u}, {0u, 0u}};
        const bool well = codes(once, e, words);
        if (well) {
            Values values;
            values.clear();
            values.add(words[0], words[1], rows, warp);
            give(values);
        }
        if (lane == 0) {
            flags(0)[warp] = !well;
        }
        __syncthreads();  // sums of all are there
        if (told(0)) {
            return warp != 0;
        }
#if SHOW
        for (int i = 0; i < 2; i++) {
            rows.show(2 * warp + i, words[i]);
        }
#endif
#pragma unroll 1
        for (int part = warp; part < kParts; part += WARPS) {
            part < 2 ? finish<0>(part % 2) : finish<kColumns - 2>(part % 2);
        }
        return true;
    }
};
