// What attention has of one head: its constants, its keys and values in shared memory, and the exact steps of its softmax.
//
// The codes of the map leave the first product in the layout of sums and enter the second in that of bytes. Of 16 keys a lane has
// 2t, 2t + 1, 8 + 2t, 9 + 2t; as an operand these are its bytes 4t .. 4t + 3. Values lie in that order, as operands: `turn`.
#pragma once

#include "attention_products.cuh"
#include "layout.cuh"
#include "rounding.cuh"

struct AttentionArgs {
    const int8_t* q;           // codes [B, H, Q_ROWS, D]; Q_DOUBLED: 2 c + 1
    const int8_t* k;           // codes [B, H, N, D]
    const uint8_t* v;          // the same; signed or not: V_SIGNED
    uint8_t* out;              // codes [B QUERIES, H D] of proj's input, ldo tiles a row
    uint8_t* map;              // SHOW: codes [B, H, N, N]
    const float* score_scale;  // [H]: scale_q * factor * scale_k, halved where whole numbers are doubled
    const float* map_scale;    // [H]
    const float* value_scale;  // [H D]: scale_p * scale_v
    const float* value_row;    // [H D]: scale_p * offset_v, where V_OFFSET = 2
    const float* offset;       // of proj's input [H D]: offset, step
    const float* step;
    const float* gain;         // [H D]: sums to a code's place in its range, 0 .. 1: gain * sum + row_gain * row sum + shift
    const float* row_gain;
    const float* shift;
    const float* bias;         // BIAS: [H, N, kBiasLine], minus infinity for keys that are none
    const uint8_t* regions;    // MASK: [windows, kRegionLine], of each token
    int heads, ldo, images, windows;
    int pack;                  // images of a block
    int near;                  // to a boundary between two codes of proj's input, of 2^FIXED a code
    float map_margin, map_unit, low, high;
    float fixed_step, fixed_first;  // places 0 .. 1 to floats whose bits are codes of FIXED binary places
};

constexpr int kThreads = 32 * WARPS;
constexpr bool kHoldsBias = BIAS && TOKENS <= 64;          // in shared memory
constexpr int kGroups = (TOKENS + 31) / 32;                // of 32 keys, a step of the second product
constexpr int kPairs = (TOKENS + 15) / 16;                 // of tiles of 8 keys
constexpr int kQueryTiles = (QUERIES + 15) / 16;           // of the first QUERIES tokens, the only ones that ask
constexpr int kSteps = HEAD_DIM / 32;                      // of the first product
constexpr int kColumns = HEAD_DIM / 16;                    // pieces of 16 of a head's channels
constexpr int kBytes = 32 * kGroups * HEAD_DIM;            // of k or v in shared memory
constexpr int kStages = RING ? RING : LONG || SPLIT ? 1 : 2;  // heads in shared memory
// Tiles from one head to the next one: as many as there are where a round of a block may have tiles of two heads.
constexpr int kRound = kStages == 1 || kQueryTiles < WARPS ? (kQueryTiles + WARPS - 1) / WARPS * WARPS : kQueryTiles;
constexpr int kQueryBytes = RING ? TOKENS * HEAD_DIM : 0;  // of q in shared memory
constexpr int kStageBytes = 2 * kBytes + 4 * 32 * kGroups + kQueryBytes;
constexpr bool kHoldsGains = RING || SPLIT;                // in shared memory
constexpr int kTotalsAt = kStageBytes;                     // SPLIT: a row's total of a warp, [WARPS, 16]
constexpr int kExactAt = kTotalsAt + 64 * WARPS;           // SPLIT: parts of exact totals, of a row of four lanes, [8, WARPS]
constexpr int kFlagsAt = kExactAt + 64 * WARPS;            // SPLIT: what a warp has to tell, [3, WARPS]
constexpr int kGainsAt = SPLIT ? kFlagsAt + (12 * WARPS + 15) / 16 * 16 : kStages * kStageBytes;
constexpr int kGainBytes = 12 * HEAD_DIM;
constexpr int kLaneBytes = HEAD_DIM / 4;                   // of a row of q or k that a lane has, see `scores_of`
constexpr bool kKeySums = Q_HALF && !Q_DOUBLED;
constexpr float kLog2e = 1.44269504f;
constexpr float kMapHigh = MAP_HIGH;
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

// A head of an image, or of a window.
struct Head {
    unsigned char *keys, *values, *queries;  // in shared memory; queries: RING
    int* key_sums;
    const float* bias;       // [N, kBiasLine] of this head
    const uint8_t* regions;  // of this window
    int image, index;
    size_t first;  // row of token 0 in k and v
    float scale, step;
    const float* gains;  // kHoldsGains: in shared memory, gain, shift and row_gain of its channels
};

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
    return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}

__device__ __forceinline__ uint32_t word_at(const void* p) { return *static_cast<const uint32_t*>(p); }

// Rows of k and v begin their way to shared memory. Those behind the last key are left as they are: their scores are masked, and
// the map's codes of them are zero.
__device__ __forceinline__ void load_head(const AttentionArgs& p, const Head& head) {
    const int8_t* const k = p.k + head.first * HEAD_DIM;
    const uint8_t* const v = p.v + head.first * HEAD_DIM;
#pragma unroll 2
    for (int i = 16 * threadIdx.x; i < TOKENS * HEAD_DIM; i += 16 * kThreads) {
        copy_async(head.keys + i, k + i, true);
        copy_async(head.values + i, v + i, true);
    }
    copies_end_group();
}

// Sums of the codes of 32 keys that have arrived, by a warp.
__device__ __forceinline__ void sum_keys(const Head& head, int group, int lane) {
    const int row = 32 * group + lane;
    if (kKeySums && row < TOKENS) {
        int sum = 0;
        for (int d = 0; d < HEAD_DIM; d += 4) {
            sum = dot4(word_at(head.keys + row * HEAD_DIM + d), 0x01010101u, sum);
        }
        head.key_sums[row] = sum;
    }
}

// What has arrived of 32 keys is made ready by a warp: values as operands, sums of the keys' codes.
__device__ __forceinline__ void prepare_group(const Head& head, int group, int lane) {
    turn<kColumns>(head.values + 32 * group * HEAD_DIM);
    sum_keys(head, group, lane);
}

// The same for all keys. Others see it after a barrier.
__device__ __forceinline__ void prepare_head(const Head& head) {
    for (int group = threadIdx.x / 32; group < kGroups; group += WARPS) {
        prepare_group(head, group, threadIdx.x % 32);
    }
}

// Scores of 16 queries and the keys of tiles 2 pair and 2 pair + 1: whole numbers s, as the bits of floats kWhole + s.
//
// In what order channels are summed does not matter, if it is the same for q and k: lane t of a quad has a quarter of a row, and its
// words are what it gives to the steps of the product, one after another.
__device__ __forceinline__ void scores_of(const uint32_t (&q)[kSteps][4], const Head& head, int pair, int lane, int (&s)[2][4]) {
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
        const unsigned char* const from = head.keys + (16 * pair + 8 * tile) * HEAD_DIM + kLaneBytes * lane;
        if constexpr (HEAD_DIM == 64) {
            const uint4 b = *reinterpret_cast<const uint4*>(from);
            const uint32_t first[2] = {b.x, b.y}, second[2] = {b.z, b.w};
            multiply_first(s[tile], q[0], first);
            multiply<true>(s[tile], q[kSteps - 1], second);
        } else {
            const uint2 b = *reinterpret_cast<const uint2*>(from);
            const uint32_t first[2] = {b.x, b.y};
            multiply_first(s[tile], q[0], first);
        }
    }
    if (kKeySums) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            const int key = 16 * pair + 8 * tile + 2 * (lane % 4);
            const int sums[2] = {key < TOKENS ? head.key_sums[key] : 0, key + 1 < TOKENS ? head.key_sums[key + 1] : 0};
#pragma unroll
            for (int e = 0; e < 4; e++) {
                s[tile][e] = 2 * s[tile][e] + (sums[e % 2] - kWholeBits);
            }
        }
    }
}

// A score as the reference engine has it, by one lane. Lanes of neighbouring keys begin with another piece of them, so that they read
// from all banks.
__device__ __forceinline__ float exact_score(const int8_t* q, const Head& head, const Place& at, int key) {
    int s = 0;
    const int first = HEAD_DIM == 64 ? key / 2 % 4 * 16 : 0;
#pragma unroll
    for (int d = 0; d < HEAD_DIM; d += 16) {
        const int piece = d ^ first;
        const uint4 a = *reinterpret_cast<const uint4*>(q + piece);
        const uint4 b = *reinterpret_cast<const uint4*>(head.keys + key * HEAD_DIM + piece);
        s += dot4(a.w, b.w, dot4(a.z, b.z, dot4(a.y, b.y, dot4(a.x, b.x, 0))));
    }
    s = kKeySums ? 2 * s + head.key_sums[key] : s;
    return BIAS ? placed(s, head.scale, at.bias[key], MASK && at.regions[key] != at.region)
                : __fmul_rn(static_cast<float>(s), head.scale);
}

// Codes of two rows' scores in two tiles, as a lane's two operand words of the second product.
struct MapWords {
    uint32_t row, row8;
};

__device__ __forceinline__ uint32_t pack(int a, int b, int c, int d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
