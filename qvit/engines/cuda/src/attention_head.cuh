// What attention has of one head: its constants, its keys and values in shared memory, and the exact steps of its softmax.
//
// The codes of the map leave the first product in the layout of sums and enter the second in that of bytes. Of 16 keys a lane has
// 2t, 2t + 1, 8 + 2t, 9 + 2t; as an operand these are its bytes 4t .. 4t + 3. Values lie in that order, as operands: `turn`.
#pragma once

#include "attention_products.cuh"
#include "layout.cuh"
#include "rounding.cuh"

struct AttentionArgs {
    const int8_t* q;           // codes [B, H, N, D]; Q_DOUBLED: 2 c + 1
    const int8_t* k;           // the same
    const uint8_t* v;          // the same; signed or not: V_SIGNED
    uint8_t* out;              // codes [B N, H D] of proj's input, ldo tiles a row
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
    int near;                  // to a boundary between two codes of proj's input, of 2^FIXED a code
    float map_margin, map_unit, low, high;
    float fixed_step, fixed_first;  // places 0 .. 1 to floats whose bits are codes of FIXED binary places
};

constexpr int kThreads = 32 * WARPS;
constexpr bool kHoldsBias = BIAS && TOKENS <= 64;          // in shared memory
constexpr int kGroups = (TOKENS + 31) / 32;                // of 32 keys, a step of the second product
constexpr int kPairs = (TOKENS + 15) / 16;                 // of tiles of 8 keys
constexpr int kQueryTiles = (TOKENS + 15) / 16;
constexpr int kSteps = HEAD_DIM / 32;                      // of the first product
constexpr int kColumns = HEAD_DIM / 16;                    // pieces of 16 of a head's channels
constexpr int kKeyLine = HEAD_DIM + 16;                    // bytes of a row of k
constexpr int kKeyBytes = 32 * kGroups * kKeyLine;
constexpr int kValueBytes = 32 * kGroups * HEAD_DIM;
constexpr int kQueryBytes = LONG ? 0 : 16 * kQueryTiles * kKeyLine;
constexpr int kValuePiece = 512;                           // bytes: 32 keys, 16 channels
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
    unsigned char *keys, *values, *queries;  // in shared memory; queries in no LONG head
    int* key_sums;
    const float* bias;       // [N, kBiasLine] of this head
    const uint8_t* regions;  // of this window
    int image, index;
    size_t first;  // row of token 0 in q
    float scale, step;
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
#ifdef QVIT_EMULATION
    return sum + byte_product<int8_t, int8_t>(a, b);
#else
    return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
#endif
}

__device__ __forceinline__ uint32_t word_at(const void* p) { return *static_cast<const uint32_t*>(p); }

// Rows of k and v to shared memory: those of k one after another, those of v in pieces of 16 channels. Rows behind the last key
// are left as they are: their scores are masked, and the map's codes of them are zero.
__device__ __forceinline__ void load_head(const AttentionArgs& p, const Head& head) {
    for (int i = threadIdx.x; i < TOKENS * kColumns; i += kThreads) {
        const int row = i / kColumns, column = i % kColumns;
        copy_async(head.keys + row * kKeyLine + 16 * column, p.k + head.first * HEAD_DIM + 16 * i, true);
        copy_async(head.values + (row / 32 * kColumns + column) * kValuePiece + row % 32 * 16, p.v + head.first * HEAD_DIM + 16 * i,
                   true);
    }
    if (!LONG) {  // zeros behind the last query, so that nothing is in doubt there
        for (int i = threadIdx.x; i < 16 * kQueryTiles * kColumns; i += kThreads) {
            const int row = i / kColumns, column = i % kColumns;
            if (gridDim.y == 1 || row / (16 * WARPS) % gridDim.y == blockIdx.y) {
                copy_async(head.queries + row * kKeyLine + 16 * column,
                           p.q + (head.first + (row < TOKENS ? row : 0)) * HEAD_DIM + 16 * column, row < TOKENS);
            }
        }
    }
    copies_end_group();
    copies_wait<0>();
    __syncthreads();
    turn(head.values, kGroups * kColumns);
    if (kKeySums) {
        for (int row = threadIdx.x; row < TOKENS; row += kThreads) {
            int sum = 0;
            for (int d = 0; d < HEAD_DIM; d += 4) {
                sum = dot4(word_at(head.keys + row * kKeyLine + d), 0x01010101u, sum);
            }
            head.key_sums[row] = sum;
        }
    }
    __syncthreads();
}

// Scores of 16 queries and the keys of tiles 2 pair and 2 pair + 1: whole numbers s, as the bits of floats kWhole + s.
__device__ __forceinline__ void scores_of(const uint32_t (&q)[kSteps][4], const Head& head, int pair, int lane, int (&s)[2][4]) {
    if constexpr (HEAD_DIM == 64) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
            uint32_t b[4];
            load_matrices(b, head.keys + (16 * pair + 8 * tile + lane % 8) * kKeyLine + 16 * (lane / 8));
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
            multiply_first(s[tile], q[0], first);
            multiply<true>(s[tile], q[kSteps - 1], second);
        }
    } else {
        uint32_t b[4];
        load_matrices(b, head.keys + (16 * pair + lane % 8 + lane / 16 * 8) * kKeyLine + 16 * (lane / 8 % 2));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply_first(s[0], q[0], first);
        multiply_first(s[1], q[0], second);
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

// A score as the reference engine has it, by one lane.
__device__ __forceinline__ float exact_score(const int8_t* q, const Head& head, const Place& at, int key) {
    int s = 0;
    for (int d = 0; d < HEAD_DIM; d += 4) {
        s = dot4(word_at(q + d), word_at(head.keys + key * kKeyLine + d), s);
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
