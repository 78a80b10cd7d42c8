// Attention of one head of one image: scores, softmax, codes of the map, values, codes of proj's input. Nothing of size N x N
// leaves the registers. In Swin a window is an image; a block then has one head of PACK windows, one after another.
//
//     scores = score_scale * (q k^T [+ 1/2 sum of k's codes]),   p = codes of softmax(scores),   y = value_scale * (p v) + ..
//
// In windows (BIAS) scores become floats, to which the bias of relative positions is added, and -100 where two tokens belong to
// different regions of a shifted map (MASK).
//
// A block holds k and v^T of its head in shared memory; each warp takes 16 queries at a time, with the scores of all keys in its
// registers where they fit (LONG = 0), else computing them three times: for the largest, for the total, and for the codes.
//
// The codes of the map leave the first product in the layout of sums and enter the second in that of bytes. Of 16 keys a lane has
// 2t, 2t + 1, 8 + 2t, 9 + 2t; as an operand these are its bytes 4t .. 4t + 3. So v^T lies with its keys in that order.
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

// 16 queries against all keys.
struct Rows {
    const AttentionArgs& p;
    const unsigned char* keys;
    const unsigned char* values;
    const int* key_sums;
    const float* bias;        // [N, kBiasLine] of this head
    const uint8_t* regions;   // of this window
    size_t first;  // row of token 0 in q
    int head, query0, lane;
    float scale, step;

    __device__ __forceinline__ int query(int half) const { return query0 + lane / 4 + 8 * half; }
    __device__ __forceinline__ const int8_t* q_row(int half) const {
        const int row = query(half) < TOKENS ? query(half) : TOKENS - 1;
        return p.q + (first + row) * HEAD_DIM;
    }

    __device__ __forceinline__ Place place(int half) const {
        const int row = query(half) < TOKENS ? query(half) : TOKENS - 1;
        return {BIAS ? bias + row * kBiasLine : nullptr, regions, MASK ? regions[row] : 0};
    }

    // Scores of the keys of tiles 2 pair and 2 pair + 1.
    __device__ __forceinline__ void scores(const uint32_t (&q)[kSteps][4], int pair, Score (&s)[2][4]) const {
#if BIAS
        int sums[2][4];
        scores_of(q, keys, key_sums, pair, lane, sums);
        const Place at[2] = {place(0), place(1)};
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int key = 16 * pair + 8 * tile + 2 * (lane % 4);
                const float2 added = *reinterpret_cast<const float2*>(at[half].bias + key);
                int other = 0;  // the regions of both keys
                if (MASK) {
                    other = *reinterpret_cast<const uint16_t*>(at[half].regions + key);
                }
                s[tile][2 * half] = placed(sums[tile][2 * half], scale, added.x, (other & 0xFF) != at[half].region);
                s[tile][2 * half + 1] = placed(sums[tile][2 * half + 1], scale, added.y, other >> 8 != at[half].region);
            }
        }
#else
        scores_of(q, keys, key_sums, pair, lane, s);
#endif
    }

    __device__ __forceinline__ void load_q(uint32_t (&q)[kSteps][4]) const {
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                q[s][i] = word_at(q_row(i % 2) + 32 * s + 16 * (i / 2) + 4 * (lane % 4));
            }
        }
    }

    __device__ __forceinline__ Softmax softmax(Score most, float total) const {
        const float top = fabsf(scaled(most, scale));
        // Scores are rounded to float32 by definition: the larger they are, the coarser.
        return {most, BIAS ? kLog2e : scale * kLog2e, 1.0f / (total * step), p.map_margin * (1.0f + 0.1f * top)};
    }

    // Codes of two tiles' scores; `close` where one of a row is in doubt.
    __device__ __forceinline__ MapWords codes(const Softmax (&of)[2], const float (&e)[2][4], bool (&close)[2]) const {
        int code[2][4];
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float v = fminf(e[tile][i] * of[i / 2].inverse, p.map_high);
                close[i / 2] |= is_close(v, of[i / 2].margin);
                code[tile][i] = code_of(v);
            }
        }
        return {pack(code[0][0], code[0][1], code[1][0], code[1][1]), pack(code[0][2], code[0][3], code[1][2], code[1][3])};
    }

    // The codes in doubt, again.
    __device__ __forceinline__ void again(const Softmax (&of)[2], const float (&e)[2][4], const Score (&s)[2][4],
                                          const double (&total)[2], MapWords& words) const {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float v = fminf(e[tile][i] * of[i / 2].inverse, p.map_high);
                if (s[tile][i] != nothing() && is_close(v, of[i / 2].margin)) {
                    const uint32_t code = exact_map_code(s[tile][i], of[i / 2].most, scale, total[i / 2], step, p.map_high);
                    const int shift = 16 * tile + 8 * (i % 2);
                    uint32_t& word = i < 2 ? words.row : words.row8;
                    word = (word & ~(0xFFu << shift)) | code << shift;
                }
            }
        }
    }

    __device__ __forceinline__ void show(int pair, const MapWords& words, int image) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = 16 * pair + i / 2 * 8 + 2 * (lane % 4) + i % 2;
                if (key < TOKENS && query(half) < TOKENS) {
                    p.map[(static_cast<size_t>(image * p.heads + head) * TOKENS + query(half)) * TOKENS + key] =
                        static_cast<uint8_t>((half ? words.row8 : words.row) >> (8 * i));
                }
            }
        }
    }

    __device__ __forceinline__ void finish(const int (&sums)[HEAD_DIM / 8][4], int (&row_sums)[2], int image) const {
        row_sums[0] = quad_sum(row_sums[0]);
        row_sums[1] = quad_sum(row_sums[1]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int codes[HEAD_DIM / 8][2];
#pragma unroll
            for (int j = 0; j < HEAD_DIM / 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int c = head * HEAD_DIM + 8 * j + 2 * (lane % 4) + e;
                    const float y = value_of(p, sums[j][2 * half + e], row_sums[half], c);
                    codes[j][e] = quotient_code(y, p.offset[c], p.inverse[c], p.step[c], p.low, p.high);
                }
            }
            write(codes, image * TOKENS + query(half), query(half) < TOKENS);
        }
    }

#if OUT_BITS
    // A row of codes, of which each lane of a quad has every fourth pair, as words of bits.
    __device__ __forceinline__ void write(const int (&codes)[HEAD_DIM / 8][2], int row, bool wanted) const {
#pragma unroll
        for (int w = 0; w < HEAD_DIM / 32; w++) {
#pragma unroll
            for (int plane = 0; plane < 2; plane++) {
                uint32_t bits = 0;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int pair = (codes[4 * w + j][0] >> plane & 1) | (codes[4 * w + j][1] >> plane & 1) << 1;
                    bits |= static_cast<uint32_t>(pair) << (8 * j + 2 * (lane % 4));
                }
                bits |= __shfl_xor_sync(kAll, bits, 1);
                bits |= __shfl_xor_sync(kAll, bits, 2);
                if (wanted && lane % 4 == 2 * (w % 2) + plane) {
                    *reinterpret_cast<uint32_t*>(p.out + code_at(row, bit_at(head * HEAD_DIM + 32 * w, plane), p.ldo)) = bits;
                }
            }
        }
    }
#else
    __device__ __forceinline__ void write(const int (&codes)[HEAD_DIM / 8][2], int row, bool wanted) const {
#pragma unroll
        for (int j = 0; j < HEAD_DIM / 8; j++) {
            if (wanted) {
                *reinterpret_cast<uint16_t*>(p.out + code_at(row, head * HEAD_DIM + 8 * j + 2 * (lane % 4), p.ldo)) =
                    static_cast<uint16_t>((codes[j][0] & 0xFF) | (codes[j][1] & 0xFF) << 8);
            }
        }
    }
#endif

    __device__ __forceinline__ void run(int image) const {
        constexpr int kPairs = 2 * kGroups;
        uint32_t q[kSteps][4];
        load_q(q);
        Score most[2] = {nothing(), nothing()};
        float total[2] = {0.0f, 0.0f};
        bool close[2] = {false, false};
        int sums[HEAD_DIM / 8][4] = {}, row_sums[2] = {0, 0};
#if LONG
        Score s[2][4];
        float e[2][4];
        for (int pair = 0; pair < (TOKENS + 15) / 16; pair++) {
            scores(q, pair, s);
            largest(s, most);
        }
        join(most);
        Softmax of[2] = {softmax(most[0], 1.0f), softmax(most[1], 1.0f)};
        for (int pair = 0; pair < (TOKENS + 15) / 16; pair++) {
            scores(q, pair, s);
            exponentials(of, s, e, total);
        }
        of[0] = softmax(most[0], quad_sum(total[0]));
        of[1] = softmax(most[1], quad_sum(total[1]));
        double exact[2];
        bool have = false;
        for (int group = 0; group < kGroups; group++) {
            MapWords words[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int pair = 2 * group + i;
                scores(q, pair, s);
                exponentials(of, s, e, total);
                close[0] = close[1] = false;
                words[i] = codes(of, e, close);
                if (__any_sync(kAll, close[0] || close[1])) {
                    if (!have) {
                        exact[0] = exact_total(q_row(0), keys, key_sums, lane, scale, most[0], place(0));
                        exact[1] = exact_total(q_row(1), keys, key_sums, lane, scale, most[1], place(1));
                        have = true;
                    }
                    again(of, e, s, exact, words[i]);
                }
                if (p.map) {
                    show(pair, words[i], image);
                }
            }
            step_of(words, group, sums, row_sums);
        }
#else
        Score s[kPairs][2][4];
        MapWords words[kPairs];
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            if (16 * pair < TOKENS) {
                scores(q, pair, s[pair]);
                largest(s[pair], most);
            }
        }
        join(most);
        Softmax of[2] = {softmax(most[0], 1.0f), softmax(most[1], 1.0f)};
        float e[kPairs][2][4];
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            if (16 * pair < TOKENS) {
                exponentials(of, s[pair], e[pair], total);
            }
        }
        of[0] = softmax(most[0], quad_sum(total[0]));
        of[1] = softmax(most[1], quad_sum(total[1]));
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            words[pair] = {0u, 0u};
            if (16 * pair < TOKENS) {
                words[pair] = codes(of, e[pair], close);
            }
        }
        if (__any_sync(kAll, close[0] || close[1])) {
            // Scores and exponentials are computed once more: their registers are needed for what has become of them.
            const double exact[2] = {exact_total(q_row(0), keys, key_sums, lane, scale, most[0], place(0)),
                                     exact_total(q_row(1), keys, key_sums, lane, scale, most[1], place(1))};
#pragma unroll
            for (int pair = 0; pair < kPairs; pair++) {
                if (16 * pair < TOKENS) {
                    Score once_more[2][4];
                    float same[2][4], unused[2] = {0.0f, 0.0f};
                    scores(q, pair, once_more);
                    exponentials(of, once_more, same, unused);
                    again(of, same, once_more, exact, words[pair]);
                }
            }
        }
#pragma unroll
        for (int pair = 0; pair < kPairs; pair++) {
            if (p.map) {
                show(pair, words[pair], image);
            }
        }
#pragma unroll
        for (int group = 0; group < kGroups; group++) {
            const MapWords two[2] = {words[2 * group], words[2 * group + 1]};
            step_of(two, group, sums, row_sums);
        }
#endif
        finish(sums, row_sums, image);
    }

    __device__ __forceinline__ static void largest(const Score (&s)[2][4], Score (&most)[2]) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                most[i / 2] = max(most[i / 2], s[tile][i]);
            }
        }
    }

    __device__ __forceinline__ static void join(Score (&most)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[half] = max(most[half], __shfl_xor_sync(kAll, most[half], 1));
            most[half] = max(most[half], __shfl_xor_sync(kAll, most[half], 2));
        }
    }

    __device__ __forceinline__ static void exponentials(const Softmax (&of)[2], const Score (&s)[2][4], float (&e)[2][4],
                                                        float (&total)[2]) {
#pragma unroll
        for (int tile = 0; tile < 2; tile++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                e[tile][i] = exponential(of[i / 2], s[tile][i]);
                total[i / 2] += e[tile][i];
            }
        }
    }

    __device__ __forceinline__ void step_of(const MapWords (&words)[2], int group, int (&sums)[HEAD_DIM / 8][4],
                                            int (&row_sums)[2]) const {
        const uint32_t a[4] = {words[0].row, words[0].row8, words[1].row, words[1].row8};
        add_values(values, group, lane, a, sums);
        if (V_OFFSET != 0) {
            row_sums[0] += byte_sum(a[0]) + byte_sum(a[2]);
            row_sums[1] += byte_sum(a[1]) + byte_sum(a[3]);
        }
    }

    __device__ __forceinline__ static int byte_sum(uint32_t word) {
#ifdef QVIT_EMULATION
        return byte_product<uint8_t, uint8_t>(word, 0x01010101u);
#else
        return static_cast<int>(__dp4a(word, 0x01010101u, 0u));
#endif
    }
};

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads, kBlocks) kernel(const AttentionArgs p) {
    QVIT_SHARED(memory);
    unsigned char *keys = memory, *values = memory + kKeyBytes;
    int* key_sums = reinterpret_cast<int*>(memory + kKeyBytes + kValueBytes);
    const int head = blockIdx.x % p.heads, first_image = blockIdx.x / p.heads * PACK;
    const float* bias = BIAS ? p.bias + static_cast<size_t>(head) * TOKENS * kBiasLine : nullptr;
    if (kHoldsBias) {
        unsigned char* held = memory + kKeyBytes + kValueBytes + 4 * 32 * kGroups;
        for (int i = threadIdx.x; i < TOKENS * kBiasLine / 4; i += kThreads) {
            copy_async(held + 16 * i, bias + 4 * i, true);
        }
        bias = reinterpret_cast<const float*>(held);
    }
#pragma unroll 1
    for (int image = first_image; image < first_image + PACK; image++) {
        if (PACK > 1) {
            if (image == p.images) {
                break;
            }
            __syncthreads();  // all are done with the keys and values before
        }
        const size_t first = (static_cast<size_t>(image) * p.heads + head) * TOKENS;
        const uint8_t* const regions = MASK ? p.regions + image % p.windows * kRegionLine : nullptr;
        load_head(p, first, keys, values, key_sums);
        for (int tile = blockIdx.y * WARPS + threadIdx.x / 32; tile < kQueryTiles; tile += WARPS * gridDim.y) {
            const Rows rows = {p,
                               keys,
                               values,
                               key_sums,
                               bias,
                               regions,
                               first,
                               head,
                               16 * tile,
                               static_cast<int>(threadIdx.x % 32),
                               p.score_scale[head],
                               p.map_scale[head]};
            rows.run(image);
        }
    }
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const AttentionArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
