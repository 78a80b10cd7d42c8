// 16 queries of a head: what both ways of computing their softmax share.
#pragma once

#include "attention_head.cuh"

struct Rows {
    const AttentionArgs& p;
    const Head& head;
    int query0, lane;

    __device__ __forceinline__ int query(int half) const { return query_of(lane, half); }
    __device__ __forceinline__ int query_of(int of_lane, int half) const { return query0 + of_lane / 4 + 8 * half; }
    __device__ __forceinline__ const int8_t* q_of(int query) const {
        const int row = query < QUERIES ? query : QUERIES - 1;
        return RING ? reinterpret_cast<const int8_t*>(head.queries) + row * HEAD_DIM
                    : p.q + (head.first / TOKENS * Q_ROWS + row) * HEAD_DIM;
    }
    __device__ __forceinline__ Place place(int query) const {
        const int row = query < QUERIES ? query : QUERIES - 1;
        return {BIAS ? head.bias + row * kBiasLine : nullptr, head.regions, MASK ? head.regions[row] : 0};
    }

    // The quarter of two rows that a lane has, as operands.
    __device__ __forceinline__ void load_q(uint32_t (&q)[kSteps][4]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int8_t* const from = q_of(query(half)) + kLaneBytes * (lane % 4);
            if constexpr (HEAD_DIM == 64) {
                const uint4 a = *reinterpret_cast<const uint4*>(from);
                q[0][half] = a.x;
                q[0][2 + half] = a.y;
                q[kSteps - 1][half] = a.z;
                q[kSteps - 1][2 + half] = a.w;
            } else {
                const uint2 a = *reinterpret_cast<const uint2*>(from);
                q[0][half] = a.x;
                q[0][2 + half] = a.y;
            }
        }
    }

#if BIAS
    // Scores of tiles 2 pair and 2 pair + 1 as the reference engine has them.
    __device__ __forceinline__ void placed_scores(const uint32_t (&q)[kSteps][4], int pair, float (&s)[2][4]) const {
        int sums[2][4];
        scores_of(q, head, pair, lane, sums);
        const Place at[2] = {place(query(0)), place(query(1))};
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
                const int *sum = &sums[tile][2 * half];
                s[tile][2 * half] = placed(sum[0] - kWholeBits, head.scale, added.x, (other & 0xFF) != at[half].region);
                s[tile][2 * half + 1] = placed(sum[1] - kWholeBits, head.scale, added.y, other >> 8 != at[half].region);
            }
        }
    }
#endif

    // Writes a pair's codes of the map, to look at.
    __device__ __forceinline__ void show(int pair, const MapWords& words) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int key = 16 * pair + i / 2 * 8 + 2 * (lane % 4) + i % 2;
                if (key < TOKENS && query(half) < QUERIES) {
                    p.map[(static_cast<size_t>(head.image * p.heads + head.index) * TOKENS + query(half)) * TOKENS + key] =
                        static_cast<uint8_t>((half ? words.row8 : words.row) >> (8 * i));
                }
            }
        }
    }
};
