// What attention has of one head: its keys and values in shared memory, scores, exponentials, and the product of codes and values.
#pragma once

#include "layout.cuh"
#include "rounding.cuh"

struct AttentionArgs {
    const int8_t* q;           // codes [B, H, N, D]; Q_DOUBLED: 2 c + 1
    const int8_t* k;           // the same
    const uint8_t* v;          // the same; signed or not: V_SIGNED
    uint8_t* out;              // codes [B N, H D] of proj's input, ldo tiles a row
    uint8_t* map;              // codes [B, H, N, N], or nothing
    const float* score_scale;  // [H]: scale_q * factor * scale_k, halved where whole numbers are doubled
    const float* map_scale;    // [H]
    const float* value_scale;  // [H D]: scale_p * scale_v
    const float* value_row;    // [H D]: scale_p * offset_v, where V_OFFSET = 2
    const float* inverse;      // of proj's input [H D]: 1 / step, offset, step
    const float* offset;
    const float* step;
    const float* bias;         // BIAS: [H, N, kBiasLine], minus infinity for keys that are none
    const uint8_t* regions;    // MASK: [windows, kRegionLine], of each token
    int heads, ldo, images, windows;
    float map_high, map_margin, low, high;
};

constexpr int kThreads = 32 * WARPS;
constexpr bool kHoldsBias = BIAS && TOKENS <= 64;  // in shared memory
constexpr int kBlocks = (kHoldsBias ? 16 : LONG || TOKENS <= 208 ? 12 : 8) / WARPS;  // of a multiprocessor, as registers allow
constexpr int kGroups = (TOKENS + 31) / 32;                // of 32 keys, a step of the second product
constexpr int kQueryTiles = (TOKENS + 15) / 16;
constexpr int kSteps = HEAD_DIM / 32;                      // of the first product
constexpr int kKeyLine = HEAD_DIM + 16;                    // bytes of a row of k
constexpr int kValueLine = 32 * kGroups + 16;              // of v^T
constexpr int kKeyBytes = 32 * kGroups * kKeyLine;
constexpr int kValueBytes = HEAD_DIM * kValueLine;
constexpr bool kKeySums = Q_HALF && !Q_DOUBLED;
constexpr float kLog2e = 1.44269504f;
constexpr int kNone = -2147483647 - 1;  // the score of no key
constexpr int kRegionLine = 32 * kGroups;
constexpr int kBiasLine = kRegionLine + 8;  // floats of a row of the bias: eight rows lie in different banks

// Scores as they enter softmax: whole numbers, which the scale of a head makes floats, or such floats with what is added to them.
#if BIAS
typedef float Score;
__device__ __forceinline__ Score nothing() { return -INFINITY; }
__device__ __forceinline__ float scaled(Score s, float) { return s; }
#else
typedef int Score;
__device__ __forceinline__ Score nothing() { return kNone; }
__device__ __forceinline__ float scaled(Score s, float scale) { return __fmul_rn(static_cast<float>(s), scale); }
#endif

// What is added to the scores of one query: a row of the bias, and regions of the window's tokens beside its own.
struct Place {
    const float* bias;
    const uint8_t* regions;
    int region;
};

// In the reference engine's roundings.
__device__ __forceinline__ float placed(int sum, float scale, float bias, bool apart) {
    const float score = __fadd_rn(__fmul_rn(static_cast<float>(sum), scale), bias);
    return MASK && apart ? __fadd_rn(score, -100.0f) : score;
}

__device__ __forceinline__ int dot4(uint32_t a, uint32_t b, int sum) {
#ifdef QVIT_EMULATION
    return sum + byte_product<int8_t, int8_t>(a, b);
#else
    return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
#endif
}

__device__ __forceinline__ uint32_t word_at(const void* p) { return *static_cast<const uint32_t*>(p); }

// k, v^T and the sums of k's codes to shared memory; zeros for keys that are none.
__device__ __forceinline__ void load_head(const AttentionArgs& p, size_t first, unsigned char* keys, unsigned char* values,
                                          int* key_sums) {
    constexpr int kPieces = HEAD_DIM / 16;
    for (int i = threadIdx.x; i < 32 * kGroups * kPieces; i += kThreads) {
        const int row = i / kPieces, piece = i % kPieces;
        copy_async(keys + row * kKeyLine + 16 * piece, p.k + (first + (row < TOKENS ? row : 0)) * HEAD_DIM + 16 * piece,
                   row < TOKENS);
    }
    copies_end_group();
    for (int i = threadIdx.x; i < 8 * kGroups * (HEAD_DIM / 4); i += kThreads) {
        const int d = i % (HEAD_DIM / 4) * 4, quad = i / (HEAD_DIM / 4), key = quad / 4 * 16 + quad % 4 * 2;
        uint32_t w[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int row = key + e % 2 + e / 2 * 8;
            w[e] = row < TOKENS ? word_at(p.v + (first + row) * HEAD_DIM + d) : 0u;
        }
        const uint32_t low01 = __byte_perm(w[0], w[1], 0x5140), low23 = __byte_perm(w[2], w[3], 0x5140);
        const uint32_t high01 = __byte_perm(w[0], w[1], 0x7362), high23 = __byte_perm(w[2], w[3], 0x7362);
        uint32_t* to = reinterpret_cast<uint32_t*>(values + d * kValueLine + 4 * quad);
        constexpr int kNext = kValueLine / 4;
        to[0] = __byte_perm(low01, low23, 0x5410);
        to[kNext] = __byte_perm(low01, low23, 0x7632);
        to[2 * kNext] = __byte_perm(high01, high23, 0x5410);
        to[3 * kNext] = __byte_perm(high01, high23, 0x7632);
    }
    copies_wait<0>();
    __syncthreads();
    if (kKeySums) {
        for (int row = threadIdx.x; row < TOKENS; row += kThreads) {
            int sum = 0;
            for (int d = 0; d < HEAD_DIM; d += 4) {
                sum = dot4(word_at(keys + row * kKeyLine + d), 0x01010101u, sum);
            }
            key_sums[row] = sum;
        }
        __syncthreads();
    }
}

// Scores of 16 queries and the keys of tiles 2 pair and 2 pair + 1, whole numbers.
__device__ __forceinline__ void scores_of(const uint32_t (&q)[kSteps][4], const unsigned char* keys, const int* key_sums, int pair,
                                          int lane, int (&s)[2][4]) {
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            s[tile][e] = 0;
        }
    }
    if constexpr (HEAD_DIM == 64) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            uint32_t b[4];
            load_matrices(b, keys + (16 * pair + 8 * tile + lane % 8) * kKeyLine + 16 * (lane / 8));
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
            multiply<true>(s[tile], q[0], first);
            multiply<true>(s[tile], q[kSteps - 1], second);
        }
    } else {
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            uint32_t b[4];
            load_matrices(b, keys + (16 * pair + lane % 8 + lane / 16 * 8) * kKeyLine + 32 * step + 16 * (lane / 8 % 2));
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
            multiply<true>(s[0], q[step], first);
            multiply<true>(s[1], q[step], second);
        }
    }
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int key = 16 * pair + 8 * tile + 2 * (lane % 4) + e % 2;
            if (kKeySums && key < TOKENS) {
                s[tile][e] = 2 * s[tile][e] + key_sums[key];
            }
            if (16 * pair + 16 > TOKENS && key >= TOKENS) {
                s[tile][e] = kNone;
            }
        }
    }
}

struct Softmax {
    Score most;
    float factor;   // of a score below the largest, for exp2
    float inverse;  // 1 / (total * step of the map)
    float margin;
};

__device__ __forceinline__ float exponential(const Softmax& of, Score score) {
#if BIAS
    return exp2_fast((score - of.most) * of.factor);
#else
    return exp2_fast(static_cast<float>(score == kNone ? -(1 << 24) : score - of.most) * of.factor);
#endif
}

// The total of a row in float64; the four lanes of the row do it together.
__device__ inline double exact_total(const int8_t* q, const unsigned char* keys, const int* key_sums, int lane, float scale,
                                     Score most, const Place& at) {
    const double top = static_cast<double>(scaled(most, scale));
    double total = 0.0;
#ifndef QVIT_EMULATION
#pragma unroll 1
#endif
    for (int key = lane % 4; key < TOKENS; key += 4) {
        int s = 0;
        for (int d = 0; d < HEAD_DIM; d += 4) {
            s = dot4(word_at(q + d), word_at(keys + key * kKeyLine + d), s);
        }
        s = kKeySums ? 2 * s + key_sums[key] : s;
        const float score = BIAS ? placed(s, scale, at.bias[key], MASK && at.regions[key] != at.region)
                                 : __fmul_rn(static_cast<float>(s), scale);
        total += exp(static_cast<double>(score) - top);
    }
    return quad_sum(total);
}

#ifdef QVIT_EMULATION
inline
#else
__noinline__
#endif
    __device__ int exact_map_code(Score score, Score most, float scale, double total, float step, float high) {
    const double top = static_cast<double>(scaled(most, scale));
    const double p = exp(static_cast<double>(scaled(score, scale)) - top) / total;
    return exact_code(__double2float_rn(p), 0.0f, step, 0.0f, high);
}

// Codes of two rows' scores in two tiles, as a lane's two operand words of the second product.
struct MapWords {
    uint32_t row, row8;
};

__device__ __forceinline__ uint32_t pack(int a, int b, int c, int d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

// y of one output channel, in the reference engine's roundings.
__device__ __forceinline__ float value_of(const AttentionArgs& p, int sum, int row_sum, int c) {
    if (V_OFFSET == 1) {
        return __fmul_rn(0.5f * __int2float_rn(2 * sum + row_sum), p.value_scale[c]);
    }
    const float y = __fmul_rn(__int2float_rn(sum), p.value_scale[c]);
    return V_OFFSET == 2 ? __fadd_rn(y, __fmul_rn(__int2float_rn(row_sum), p.value_row[c])) : y;
}

// The second product's step over 32 keys.
__device__ __forceinline__ void add_values(const unsigned char* values, int group, int lane, const uint32_t (&a)[4],
                                           int (&sums)[HEAD_DIM / 8][4]) {
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 16; j++) {
        uint32_t b[4];
        load_matrices(b, values + (16 * j + lane % 8 + lane / 16 * 8) * kValueLine + 32 * group + 16 * (lane / 8 % 2));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        if constexpr (V_SIGNED) {
            multiply<false>(sums[2 * j], a, first);
            multiply<false>(sums[2 * j + 1], a, second);
        } else {
            multiply_unsigned(sums[2 * j], a, first);
            multiply_unsigned(sums[2 * j + 1], a, second);
        }
    }
}
