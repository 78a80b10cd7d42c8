// Softmax of 16 queries with scores computed three times: for the largest, for the total, and for the codes, each of which is
// computed again in float64 where float32 leaves it in doubt. Any scores, any number of keys, few registers; slow.
#pragma once

#include "attention_values.cuh"

struct Softmax {
    Score most;
    float factor;   // of a score below the largest, for exp2
    float inverse;  // 1 / (total * step of the map)
    float margin;
};

struct Thrice {
    const Rows& rows;

    __device__ __forceinline__ void scores(const uint32_t (&q)[kSteps][4], int pair, Score (&s)[2][4]) const {
#if BIAS
        rows.placed_scores(q, pair, s);
#else
        scores_of(q, rows.head, pair, rows.lane, s);
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const int key = 16 * pair + 8 * tile + 2 * (rows.lane % 4) + e % 2;
                s[tile][e] = key < TOKENS ? s[tile][e] - kWholeBits : kNone;
            }
        }
#endif
    }

    __device__ __forceinline__ Softmax softmax(Score most, float total) const {
        const float top = fabsf(scaled(most, rows.head.scale));
        // Scores are rounded to float32 by definition: the larger they are, the coarser.
        return {most, BIAS ? kLog2e : rows.head.scale * kLog2e, 1.0f / (total * rows.head.step),
                rows.p.map_margin * (1.0f + 0.1f * top)};
    }

    __device__ __forceinline__ static float exponential(const Softmax& of, Score score) {
#if BIAS
        return exp2_fast((score - of.most) * of.factor);
#else
        return exp2_fast(static_cast<float>(score == kNone ? -(1 << 24) : score - of.most) * of.factor);
#endif
    }

    // The total of a row in float64; the four lanes of the row do it together.
    __device__ __forceinline__ double exact_total(int half, Score most) const {
        const double top = static_cast<double>(scaled(most, rows.head.scale));
        const Place at = rows.place(rows.query(half));
        double total = 0.0;
#pragma unroll 1
        for (int key = rows.lane % 4; key < TOKENS; key += 4) {
            total += exp(static_cast<double>(exact_score(rows.q_of(rows.query(half)), rows.head, at, key)) - top);
        }
        return quad_sum(total);
    }

    __device__ __forceinline__ uint32_t exact_code_of(Score score, Score most, double total) const {
        const double top = static_cast<double>(scaled(most, rows.head.scale));
        const double p = exp(static_cast<double>(scaled(score, rows.head.scale)) - top) / total;
        return static_cast<uint32_t>(exact_code(__double2float_rn(p), 0.0f, rows.head.step, 0.0f, kMapHigh));
    }

    // Codes of a pair; `total` is computed when it is first needed.
    __device__ __forceinline__ MapWords codes(const Softmax (&of)[2], const Score (&s)[2][4], double (&total)[2], bool& have) const {
        int code[2][4];
        bool close[2][4], any = false;
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float v = fminf(exponential(of[i / 2], s[tile][i]) * of[i / 2].inverse, kMapHigh);
                close[tile][i] = s[tile][i] != nothing() && is_close(v, of[i / 2].margin);
                any |= close[tile][i];
                code[tile][i] = code_of(v);
            }
        }
        if (__any_sync(kAll, any)) {
            if (!have) {
#pragma unroll 1
                for (int half = 0; half < 2; half++) {
                    const double sum = exact_total(half, half ? of[1].most : of[0].most);
                    total[0] = half ? total[0] : sum;
                    total[1] = half ? sum : total[1];
                }
                have = true;
            }
#pragma unroll 1
            for (int n = 0; n < 8; n++) {  // not unrolled, but in registers
                const int half = n / 2 % 2;
                Score score = s[0][0];
                bool wanted = false;
#pragma unroll
                for (int m = 0; m < 8; m++) {
                    score = m == n ? s[m / 4][m % 4] : score;
                    wanted = m == n ? close[m / 4][m % 4] : wanted;
                }
                if (wanted) {
                    const int exact = static_cast<int>(exact_code_of(score, half ? of[1].most : of[0].most, total[half]));
#pragma unroll
                    for (int m = 0; m < 8; m++) {
                        code[m / 4][m % 4] = m == n ? exact : code[m / 4][m % 4];
                    }
                }
            }
        }
        return {pack(code[0][0], code[0][1], code[1][0], code[1][1]), pack(code[0][2], code[0][3], code[1][2], code[1][3])};
    }

    __device__ __forceinline__ void run() const {
        uint32_t q[kSteps][4];
        rows.load_q(q);
        Score s[2][4], most[2] = {nothing(), nothing()};
#pragma unroll 1
        for (int pair = 0; pair < kPairs; pair++) {
            scores(q, pair, s);
#pragma unroll
            for (int n = 0; n < 8; n++) {
                most[n / 2 % 2] = max(most[n / 2 % 2], s[n / 4][n % 4]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = max(most[half], __shfl_xor_sync(kAll, most[half], 1));
            most[half] = max(most[half], __shfl_xor_sync(kAll, most[half], 2));
        }
        Softmax of[2] = {softmax(most[0], 1.0f), softmax(most[1], 1.0f)};
        float total[2] = {0.0f, 0.0f};
#pragma unroll 1
        for (int pair = 0; pair < kPairs; pair++) {
            scores(q, pair, s);
#pragma unroll
            for (int n = 0; n < 8; n++) {
                total[n / 2 % 2] += exponential(of[n / 2 % 2], s[n / 4][n % 4]);
            }
        }
        of[0] = softmax(most[0], quad_sum(total[0]));
        of[1] = softmax(most[1], quad_sum(total[1]));
        double exact[2];
        bool have = false;
        Values values;
        values.clear();
#pragma unroll 1
        for (int group = 0; group < kGroups; group++) {
            MapWords words[2] = {{0u, 0u}, {0u, 0u}};
#pragma unroll 1
            for (int i = 0; i < 2; i++) {
                const int pair = 2 * group + i;
                if (pair < kPairs) {
                    scores(q, pair, s);
                    const MapWords mine = codes(of, s, exact, have);
                    words[0] = i ? words[0] : mine;
                    words[1] = i ? mine : words[1];
#if SHOW
                    rows.show(pair, mine);
#endif
                }
            }
            values.add(words[0], words[1], rows, group);
        }
        values.finish(rows);
    }
};

// Out of the way of what all warps go through: its own registers, and not among their instructions.
__noinline__ __device__ void thrice(const AttentionArgs& p, const Head& head, int query0) {
    const Rows rows = {p, head, query0, static_cast<int>(threadIdx.x % 32)};
    Thrice{rows}.run();
}
