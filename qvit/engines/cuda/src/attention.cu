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
#include "attention_head.cuh"

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
    await_former_kernel();
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
