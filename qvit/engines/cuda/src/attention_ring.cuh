// Keys and values of a block's heads in shared memory, a ring of RING of them, for warps that wait for each other as seldom as
// can be: each takes the next 16 queries that nobody has, whichever head they are of.
//
//     full[s]    the head in stage s has arrived
//     ready[s]   and its groups of 32 keys are prepared
//     left[s]    so many of its tiles are done; who does the last one begins to load the head that has the stage next
//
// Group g of a head is prepared by the warp that takes tile g of the one kAhead before, so that nearly always all is there.
// Nobody waits for what a later tile does: tiles are taken in their order, so that the first one that is not done can go on.
#pragma once

#include "attention_rows.cuh"
#include "hopper.cuh"

#ifndef QVIT_EMULATION  // else in emulation_hopper.h
// The same number, of which the compiler does not know it: what follows from it is computed here, not kept over a loop.
__device__ __forceinline__ int anew(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
// One more, in no order with other accesses.
__device__ __forceinline__ int take_shared(int* to) {
    int old;
    asm volatile("atom.relaxed.cta.shared::cta.inc.u32 %0, [%1], 0x7FFFFFFF;" : "=r"(old) : "r"(shared_address(to)));
    return old;
}
// What others wrote before their own addition is seen after this one.
__device__ __forceinline__ int add_shared(int* to, int value) {
    int old;
    asm volatile("atom.acq_rel.cta.shared::cta.add.s32 %0, [%1], %2;" : "=r"(old) : "r"(shared_address(to)), "r"(value) : "memory");
    return old;
}
// Bulk copies do not overtake what was done to shared memory before.
__device__ __forceinline__ void proxies_meet() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#endif

template <class HeadOf>
struct Ring {
    const AttentionArgs& p;
    const HeadOf& head_of;
    unsigned char* memory;  // heads, barriers, counters, queries, gains
    int count, warp, lane;

    static constexpr int kAhead = 2;
    // Of a barrier only one bit of the phase is seen: no warp may wait for a head while the one that had the stage before is not
    // there. Then all tiles from that one on would have to be among those that warps have, or have taken to do next.
    static_assert((RING - kAhead) * kQueryTiles >= 2 * WARPS && kGroups <= kQueryTiles);

    __device__ __forceinline__ unsigned char* end() const { return memory + kStages * kStageBytes; }  // of the heads
    __device__ __forceinline__ Barrier* full(int n) const { return reinterpret_cast<Barrier*>(end()) + n % RING; }
    __device__ __forceinline__ Barrier* ready(int n) const { return reinterpret_cast<Barrier*>(end()) + RING + n % RING; }
    __device__ __forceinline__ int* left(int n) const { return reinterpret_cast<int*>(end() + 16 * RING) + n % RING; }
    __device__ __forceinline__ int* taken() const { return reinterpret_cast<int*>(end() + 20 * RING); }

    // First of all; by all warps.
    __device__ __forceinline__ void begin() const {
        if (threadIdx.x == 0) {
            for (int n = 0; n < RING; n++) {
                barrier_init(full(n), 1);
                barrier_init(ready(n), kGroups);
                *left(n) = 0;
            }
            *taken() = WARPS;
            barriers_ready();
            proxies_meet();
            for (int n = 0; n < min(count, RING); n++) {
                load(n);
            }
        }
        float* const gains = reinterpret_cast<float*>(memory + kGainsAt);
        for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) {
            const int c = head_of(0).index * HEAD_DIM + i;
            gains[i] = p.gain[c];
            gains[HEAD_DIM + i] = p.shift[c];
            gains[2 * HEAD_DIM + i] = p.row_gain[c];
        }
        __syncthreads();
        for (int i = warp; i < min(count, kAhead) * kGroups; i += WARPS) {
            prepare(i / kGroups, i % kGroups);
        }
    }

    // The tile that a warp takes next; its first one is its own number.
    __device__ __forceinline__ int take() const {
        int tile = 0;
        if (lane == 0) {
            tile = take_shared(taken());
        }
        return __shfl_sync(kAll, tile, 0);
    }

    // Head n can be used for its tile `part`.
    __device__ __forceinline__ void enter(int n, int part) const {
        if (part < kGroups && n + kAhead < count) {
            prepare(n + kAhead, part);
        }
        barrier_wait(ready(n), n / RING % 2);
    }

    // A lane's own pieces of the queries of a tile come to shared memory while the tile before is computed.
    __device__ __forceinline__ void begin_queries(const Rows& rows) const {
        if constexpr (HEAD_DIM == 64) {
            __syncwarp();  // nobody reads those before
            unsigned char* const to = memory + kQueriesAt + 1024 * warp + 16 * lane;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                copy_async(to + 512 * half, rows.q_of(rows.query(half)) + kLaneBytes * (rows.lane % 4), true);
            }
            copies_end_group();
        }
    }

    // Rows of 16 queries of 64 channels, until the next ones begin to come.
    __device__ __forceinline__ const int8_t* queries() const {
        return HEAD_DIM == 64 ? reinterpret_cast<const int8_t*>(memory + kQueriesAt + 1024 * warp) : nullptr;
    }

    // They are operands, as in `Rows::load_q`.
    __device__ __forceinline__ void end_queries(const Rows& rows, uint32_t (&q)[kSteps][4]) const {
        if constexpr (HEAD_DIM == 64) {
            copies_wait<0>();
            __syncwarp();  // others' pieces are there, too
            const unsigned char* const from = memory + kQueriesAt + 1024 * warp + 16 * lane;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const uint4 a = *reinterpret_cast<const uint4*>(from + 512 * half);
                q[0][half] = a.x;
                q[0][2 + half] = a.y;
                q[kSteps - 1][half] = a.z;
                q[kSteps - 1][2 + half] = a.w;
            }
        } else {
            rows.load_q(q);
        }
    }

    // A tile of head n needs it no more.
    __device__ __forceinline__ void leave(int n) const {
        __syncwarp();
        if (lane == 0 && add_shared(left(n), 1) == kQueryTiles - 1) {
            *left(n) = 0;
            if (n + RING < count) {
                proxies_meet();
                load(n + RING);
            }
        }
    }

private:
    // By one thread. Rows behind the last key are left as they are: their scores are masked, and the map's codes of them are zero.
    __device__ __forceinline__ void load(int n) const {
        const Head head = head_of(n);
        barrier_expect(full(n), 2 * TOKENS * HEAD_DIM);
        copy_tile(head.keys, p.k + head.first * HEAD_DIM, TOKENS * HEAD_DIM, full(n));
        copy_tile(head.values, p.v + head.first * HEAD_DIM, TOKENS * HEAD_DIM, full(n));
    }

    __device__ __forceinline__ void prepare(int n, int group) const {
        barrier_wait(full(n), n / RING % 2);
        prepare_group(head_of(n), group, lane);
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(ready(n));
        }
    }
};
