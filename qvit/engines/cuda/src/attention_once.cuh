// Softmax of 16 queries with scores computed once, their exponentials kept in registers.
//
// The largest score is not sought: x = score * log2(e) goes to exp2 as it is, and a row whose total leaves float32's comfort is left
// to `Thrice`. Sums s come out of the tensor cores as the bits of W + s, W = 1.5 * 2^23, so that one fused multiply-add,
// x = (W + s) F - fl(W F), gives them as float and scaled; that W F is rounded shifts all x by the same r and cancels.
//
// How far a value v = p / step may lie from the reference engine's, relative to v, in units u = 2^-24 of rounding. y = s * scale *
// log2(e) exactly, L = log2 of the total:
//
//     F               scale * log2(e), rounded, and log2(e) itself: 1.3 |y|   the reference engine's score, rounded: |y|
//     x, rounded      |y|, as |r| is below 1
//     together        3.3 ln(2) |y| < 2.3 |y|, for v's own exponential; for the total their mean, sum of p |y|
//     exp2            4 (2^-22), both for v and for the total
//     total           a rounding every second pair of tiles, five more
//     1 / (total * step * high) 4, product 1, the reference engine's p and p / step 2; terms of second order less than 1
//
// The mean: y = L + log2 p, so that sum of p |y| <= |L| + H(p) <= |L| + log2 N; and, as |y| = max(y, 0) + max(-y, 0) and
// 2^y max(-y, 0) <= 0.531, sum of p |y| <= max(largest y, 0) + 0.54 N / total. The lesser holds.
//
// Where v is that near to the boundary between two codes the definition decides. Scores without a bias are whole numbers: a row has
// MAP_HIGH boundaries, of which each has one nearest score. Only if that score were in doubt, and is among the row's, is it
// decided, for all keys that have it (ROW_CHECK). Else every value is looked at, and `Thrice` computes the rows again.
#pragma once

#include "attention_thrice.cuh"

struct Once {
    const Rows& rows;
    float factor, base, shift, inverse_factor;  // F, - fl(W F), r, 1 / F

    static constexpr float kRoundings = 21.0f + (kPairs + 1) / 2;
    static constexpr float kEach = 2.3f, kLogTokens = 10.0f;  // log2 of at most 1024 keys
    static_assert(TOKENS <= 1024);
    static constexpr int kTiles = (TOKENS + 7) / 8;
    static constexpr int kChecks = (MAP_HIGH + 3) / 4;  // boundaries of a row that a lane looks at

    __device__ __forceinline__ static Once of(const Rows& rows) {
        const float factor = __fmul_rn(rows.head.scale, kLog2e), product = __fmul_rn(kWhole, factor);
        return {rows, factor, -product, fmaf(kWhole, factor, -product), reciprocal_fast(factor)};
    }

    // Of a score's bits.
    __device__ __forceinline__ float exponential(float score) const { return exp2_fast(fmaf(score, factor, base)); }

    // Exponentials of tiles 2 pair and 2 pair + 1.
    __device__ __forceinline__ void exponentials(const uint32_t (&q)[kSteps][4], int pair, float (&e)[2][4]) const {
#if BIAS
        float s[2][4];
        rows.placed_scores(q, pair, s);
#else
        int s[2][4];
        scores_of(q, rows.head, pair, rows.lane, s);
#endif
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int first = 16 * pair + 8 * tile, key = first + 2 * (rows.lane % 4) + i % 2;
                if (first >= TOKENS) {
                    e[tile][i] = 0.0f;
                } else {
#if BIAS
                    e[tile][i] = exp2_fast(s[tile][i] * kLog2e);  // of keys that are none: of minus infinity
#else
                    e[tile][i] = exponential(__int_as_float(s[tile][i]));
                    if (first + 8 > TOKENS) {
                        e[tile][i] = key < TOKENS ? e[tile][i] : 0.0f;
                    }
#endif
                }
            }
        }
    }

    // Adds a pair's exponentials to totals of two rows, of even and odd pairs.
    __device__ __forceinline__ static void add(const float (&e)[2][4], bool second, int pair, float (&total)[2][2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float a = e[0][2 * half] + e[0][2 * half + 1], b = e[1][2 * half] + e[1][2 * half + 1];
            total[half][pair % 2] += second ? a + b : a;
        }
    }

    // The queries' operands. They are four neighbouring registers, of two rows, but a row comes as such four: without an operation
    // between, one that the compiler does not know to change nothing, they are moved anew for every product.
    __device__ __forceinline__ void given(const uint32_t (&from)[kSteps][4], uint32_t (&q)[kSteps][4]) const {
        const uint32_t zero = static_cast<uint32_t>(rows.p.heads >> 31);
#pragma unroll
        for (int i = 0; i < 4 * kSteps; i++) {
            q[i / 4][i % 4] = from[i / 4][i % 4] ^ zero;
        }
    }

    // The largest of the four lanes of a row.
    __device__ __forceinline__ static float quad_most(int bits) {
        bits = max(bits, __shfl_xor_sync(kAll, bits, 1));
        return __int_as_float(max(bits, __shfl_xor_sync(kAll, bits, 2)));
    }

    // A row's numbers. `near`: units that v may be off, but for kEach times its own |y|.
    struct Row {
        float step, inverse, near;  // total * step; one over it, and over the highest code where places 0 .. 1 are computed
        bool lost;
    };

    // `largest`: no exponential of the row is above it.
    __device__ __forceinline__ Row row(float total, float largest) const {
        Row of;
        const float level = fabsf(log2_fast(total));
        of.step = __fmul_rn(total, rows.head.step);
        of.inverse = reciprocal_fast(PACKED && ROW_CHECK ? of.step : __fmul_rn(of.step, kMapHigh));
        const float mean = fmaxf(log2_fast(largest), 0.0f) + 0.54f * TOKENS * reciprocal_fast(total);
        of.near = kRoundings + kEach * (fabsf(shift) + fminf(level + kLogTokens, mean));
        of.lost = !(total > 1e-18f && total < 1e36f);
#if ROW_CHECK
        // The nearest score of a boundary must be the only one that can be in doubt, and be found in float32.
        const float most = fmaxf(level, fabsf(log2_fast(0.5f * of.step)));
        of.lost |= rows.p.map_unit * (of.near + kEach * most) > 0.1f * factor;
#else
        of.near += kEach * fmaxf(level, fabsf(log2_fast(0.49f * of.step)));
#endif
        return of;
    }

#if ROW_CHECK
    // The score next to a boundary between codes of a row, as a float's bits have it.
    __device__ __forceinline__ float score_at(float log_step, float boundary) const {
        return fmaf(log_step + log2_fast(boundary), inverse_factor, kWhole);
    }

    // log2 of a row's step, less r: from this and a boundary's logarithm the score follows.
    __device__ __forceinline__ float log_step(const Row& of) const { return log2_fast(of.step) - shift; }

    // Whether the score next to a boundary would be in doubt.
    __device__ __forceinline__ bool suspect(const Row& of, float log_step, float boundary) const {
        const float y = log_step + log2_fast(boundary), unit = rows.p.map_unit;  // |r| is in `near`
        const float e = exponential(score_at(log_step, boundary));
        const float off = PACKED ? fmaf(e, of.inverse, -boundary) : fmaf(__fmul_rn(e, of.inverse), kMapHigh, -boundary);
        return fabsf(off) <= fmaf(kEach * unit, fabsf(y), of.near * unit) * boundary;
    }

    // Bit 2 k + half: whether boundary 4 k + t of a row is next to a score that would be in doubt, t of the row's four lanes.
    __device__ __forceinline__ unsigned suspects_of(const Row (&of)[2]) const {
        unsigned suspects = 0;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float log = log_step(of[half]);
#pragma unroll
            for (int k = 0; k < kChecks; k++) {
                const float boundary = 4 * k + 0.5f + rows.lane % 4;
                if (suspect(of[half], log, boundary) && boundary < kMapHigh) {
                    suspects |= 1u << (2 * k + half);
                }
            }
        }
        return suspects;
    }
#endif

    // Codes of a pair of tiles, the second only if there is one.
    __device__ __forceinline__ MapWords words_of(const float (&e)[2][4], const Row (&of)[2], bool second, bool& lost) const {
        int code[2][4];
#if ROW_CHECK && PACKED
        // Whole numbers of 16 bits, two at a time not more than the highest code.
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                code[tile][i] = tile == 0 || second ? __float_as_int(fmaf(e[tile][i], of[i / 2].inverse, kWhole)) : 0;
            }
        }
        return {capped(code[0][0], code[0][1], code[1][0], code[1][1]), capped(code[0][2], code[0][3], code[1][2], code[1][3])};
#else
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float v = __saturatef(__fmul_rn(e[tile][i], of[i / 2].inverse));
                const float whole = fmaf(v, kMapHigh, kWhole);
#if !ROW_CHECK
                const float off = fmaf(v, kMapHigh, -(whole - kWhole));
                lost |= fabsf(off) > fmaf(v, -kMapHigh * rows.p.map_unit * of[i / 2].near, 0.5f);
#endif
                code[tile][i] = __float_as_int(whole);
            }
        }
        return {pack(code[0][0], code[0][1], code[1][0], code[1][1]), pack(code[0][2], code[0][3], code[1][2], code[1][3])};
#endif
    }

    // Whether all went well. Takes the queries' operands; `next` is called when there is room for those of the next rows, `leave`
    // when the head's keys and values are needed no more.
    template <class Next, class Leave>
    __device__ __forceinline__ bool run(const uint32_t (&operands)[kSteps][4], const Next& next, const Leave& leave) const {
        uint32_t q[kSteps][4];
        given(operands, q);
        float e[kPairs][2][4], total[2][2] = {};  // of rows, even and odd pairs
        int most[2] = {0, 0};                     // the largest, as bits: none is below zero
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            exponentials(q, pair, e[pair]);
            add(e[pair], 16 * pair + 8 < TOKENS, pair, total);
#pragma unroll
            for (int n = 0; n < 8; n++) {
                most[n / 2 % 2] = max(most[n / 2 % 2], __float_as_int(e[pair][n / 4][n % 4]));
            }
        }
        const Row of[2] = {row(quad_sum(total[0][0] + total[0][1]), quad_most(most[0])),
                           row(quad_sum(total[1][0] + total[1][1]), quad_most(most[1]))};
        bool lost = of[0].lost || of[1].lost;
#if ROW_CHECK
        const unsigned suspects = suspects_of(of);
        if (__any_sync(kAll, suspects != 0 || lost)) {
            if (__any_sync(kAll, lost)) {
                next();
                return false;
            }
            settle(of, suspects, e);
        }
#endif
        MapWords words[2 * kGroups];
#pragma unroll
        for (int pair = 0; pair < 2 * kGroups; pair++) {
            words[pair] = {0u, 0u};
            if (pair < kPairs) {
                words[pair] = words_of(e[pair], of, 2 * pair + 1 < kTiles, lost);
            }
        }
#if !ROW_CHECK
        if (__any_sync(kAll, lost)) {
            next();
            return false;
        }
#endif
        Values values;
        values.clear();
#pragma unroll
        for (int group = 0; group < kGroups; group++) {
            values.add(words[2 * group], words[2 * group + 1], rows, group);
        }
        leave();
        next();
#if SHOW
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            rows.show(pair, words[pair]);
        }
#endif
        values.finish(rows);
        return true;
    }

    // Four codes, the lower halves of words, not more than the highest one.
    __device__ __forceinline__ static uint32_t capped(int a, int b, int c, int d) {
        constexpr uint32_t kHigh = 0x10001u * MAP_HIGH;
        return __byte_perm(__vminu2(__byte_perm(a, b, 0x5410), kHigh), __vminu2(__byte_perm(c, d, 0x5410), kHigh), 0x6420);
    }

#if ROW_CHECK
    // A boundary next to a score that would be in doubt, of a row of four lanes; not every four have one.
    struct Doubt {
        bool ours, leads;  // of these four lanes; of this one
        int half;
        float step, score, wanted;  // of the row; as a float's bits have it; its exponential, else none that there is
    };
    __device__ __forceinline__ Doubt doubt(const Row (&of)[2], unsigned suspects, unsigned lanes) const {
        const int quad = rows.lane & ~3, ours = lanes >> quad & 15;
        const int leader = quad + (ours ? first_bit(ours) : 0);
        const int bit = __shfl_sync(kAll, suspects ? first_bit(suspects) : 0, leader), half = bit % 2;
        const float boundary = 4 * (bit / 2) + 0.5f + leader % 4;
        const float score = score_at(half ? log_step(of[1]) : log_step(of[0]), boundary);
        return {ours != 0, rows.lane == leader, half, half ? of[1].step : of[0].step, score, ours ? exponential(score) : -1.0f};
    }

    // Decides what is in doubt, of eight rows at once. Keys whose score is next to a boundary get an exponential whose code is the
    // right one.
    template <int kMine>
    __device__ __forceinline__ void settle(const Row (&of)[2], unsigned suspects, float (&e)[kMine][2][4]) const {
        unsigned lanes;
#pragma unroll 1
        while ((lanes = __ballot_sync(kAll, suspects != 0)) != 0) {
            const Doubt about = doubt(of, suspects, lanes);
            unsigned found = __ballot_sync(kAll, has(e, about));
#pragma unroll 1
            while (found) {
                const int one = first_bit(found), s = __shfl_sync(kAll, __float_as_int(about.score) - kWholeBits, one);
                const int code = decided(s, rows.query_of(one, __shfl_sync(kAll, about.half, one)));
                if (rows.lane / 4 == one / 4 && code != code_in_float(about.wanted, about.half ? of[1] : of[0])) {
                    replace(e, about, code);
                }
                found &= ~(15u << (one & ~3));
            }
            if (about.leads) {
                suspects &= suspects - 1;
            }
        }
    }

    // The code that `words_of` gives an exponential; nearly always the right one.
    __device__ __forceinline__ static int code_in_float(float e, const Row& of) {
        const float v = __saturatef(__fmul_rn(e, of.inverse));
        const float whole = PACKED ? fmaf(e, of.inverse, kWhole) : fmaf(v, kMapHigh, kWhole);
        return min(__float_as_int(whole) - kWholeBits, MAP_HIGH);
    }

    template <int kMine>
    __device__ __forceinline__ static bool has(const float (&e)[kMine][2][4], const Doubt& about) {
        return about.half ? has<1>(e, about.wanted) : has<0>(e, about.wanted);
    }
    template <int kMine>
    __device__ __forceinline__ static void replace(float (&e)[kMine][2][4], const Doubt& about, int code) {
        const float instead = about.step * static_cast<float>(code);
        about.half ? replace<1>(e, about.wanted, instead) : replace<0>(e, about.wanted, instead);
    }

    template <int kHalf, int kMine>
    __device__ __forceinline__ static bool has(const float (&e)[kMine][2][4], float wanted) {
        bool found[4] = {};  // that none waits for the one before
#pragma unroll
        for (int tile = 0; tile < min(kTiles, 2 * kMine); tile++) {
            found[2 * (tile % 2)] |= e[tile / 2][tile % 2][2 * kHalf] == wanted;
            found[2 * (tile % 2) + 1] |= e[tile / 2][tile % 2][2 * kHalf + 1] == wanted;
        }
        return found[0] || found[1] || found[2] || found[3];
    }

    template <int kHalf, int kMine>
    __device__ __forceinline__ static void replace(float (&e)[kMine][2][4], float wanted, float instead) {
#pragma unroll
        for (int tile = 0; tile < min(kTiles, 2 * kMine); tile++) {
#pragma unroll
            for (int i = 2 * kHalf; i < 2 * kHalf + 2; i++) {
                float& one = e[tile / 2][tile % 2][i];
                one = one == wanted ? instead : one;
            }
        }
    }

    // The exponential of a key's score over that of score s of the same query.
    __device__ __forceinline__ double exact_ratio(int s, const int8_t* q, int query, int key) const {
        const double own = static_cast<double>(scaled(s, rows.head.scale));
        const float score = exact_score(q, rows.head, rows.place(query), key);
        const double one = exp_series(fmax(static_cast<double>(score) - own, -690.0));  // of 1e-300 nothing is left
        return key < TOKENS ? one : 0.0;
    }

    // The code of a score from the total of such ratios.
    __device__ __forceinline__ int code_of_total(double total) const {
        return exact_code(__double2float_rn(1.0 / total), 0.0f, rows.head.step, 0.0f, kMapHigh);
    }

    // The code of score s of a query, by the whole warp.
    __device__ __forceinline__ int decided(int s, int query) const {
        const int8_t* const q = rows.q_of(query);
        double total = 0.0;
#pragma unroll 1
        for (int first = 0; first < TOKENS; first += 32) {
            total += exact_ratio(s, q, query, first + rows.lane);
        }
        return code_of_total(warp_sum(total));
    }
#endif
};
