// Queries, keys and values of a block's heads in shared memory, a ring of RING stages, for warps that each take the next 16 queries
// that nobody has, whichever head they are of.
//
//     full[s]    the head in stage s has arrived
//     ready[s]   and its groups of 32 keys are prepared
//     free[s]    all of its tiles are done
//
// Head n is prepared by those who take the first tiles of head n - 1, a group each, and head n + RING - 2 is sent for by who takes
// one of the first tiles of head n, when those of head n - 2 are done, as nearly always they are. Nobody waits for what a later tile
// does: tiles are taken in their order, so that the first one that is not done can go on.
//
// What is the same for all lanes comes from `of_first_lane`, for the compiler to keep it out of the lanes' registers.
#pragma once

#include "attention_rows.cuh"
#include "hopper.cuh"

template <class HeadOf>
struct Ring {
    const AttentionArgs& p;
    const HeadOf& head_of;
    unsigned char* memory;  // heads, gains, barriers, a counter
    int count, lane;

    static constexpr int kSender = kQueryTiles > 2 ? 2 : kQueryTiles - 1;  // the tile that sends for a head
    // Of a barrier only one bit of the phase is seen: nobody may wait for a head's phase while the one that had the stage before
    // has not ended its own. Then all tiles of a head that has not come and those up to the waiting one would have to be among
    // those that warps have, or have taken to do next.
    static_assert((RING - 1) * kQueryTiles >= 2 * WARPS && 2 * kQueryTiles + kSender + 2 > 2 * WARPS);
    static_assert(RING >= 4 && kGroups <= kQueryTiles);  // what is sent for with head n is prepared with head n + RING - 3

    __device__ __forceinline__ Barrier* barriers() const {
        return reinterpret_cast<Barrier*>(memory + kGainsAt + kGainBytes);
    }
    __device__ __forceinline__ Barrier* full(unsigned n) const { return barriers() + n % RING; }
    __device__ __forceinline__ Barrier* ready(unsigned n) const { return barriers() + RING + n % RING; }
    __device__ __forceinline__ Barrier* free(unsigned n) const { return barriers() + 2 * RING + n % RING; }
    __device__ __forceinline__ static int phase(unsigned n) { return n / RING % 2; }
    __device__ __forceinline__ int* taken() const { return reinterpret_cast<int*>(barriers() + 3 * RING); }

    // First of all; by all warps.
    __device__ __forceinline__ void begin() const {
        if (threadIdx.x == 0) {
            for (int n = 0; n < RING; n++) {
                barrier_init(full(n), 1);
                barrier_init(ready(n), kGroups);
                barrier_init(free(n), kQueryTiles);
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
        for (int group = threadIdx.x / 32; group < kGroups; group += WARPS) {
            prepare(0, group);
        }
    }

    // The tile that a warp takes next, for the first lane; its first one is its own number.
    __device__ __forceinline__ int take() const { return lane == 0 ? take_shared(taken()) : 0; }

    // Head n can be used for its tile `part`.
    __device__ __forceinline__ void enter(int n, int part) const {
        if (part < kGroups && n + 1 < count) {
            prepare(n + 1, part);
        }
        if (part == kSender && n >= 2 && n - 2 + RING < count) {
            // Acquires what the warps that are done released: their loads come before what overwrites the stage.
            barrier_wait(free(n - 2), phase(n - 2));
            if (lane == 0) {
                proxies_meet();
                load(n - 2 + RING);
            }
        }
        barrier_wait(ready(n), phase(n));
    }

    // A tile of head n needs it no more.
    __device__ __forceinline__ void leave(int n) const {
        __syncwarp();  // nor do the other lanes
        if (lane == 0) {
            barrier_arrive(free(n));
        }
    }

private:
    // By one thread. Rows behind the last key are left as they are: their scores are masked, and the map's codes of them are zero.
    __device__ __forceinline__ void load(int n) const {
        const Head head = head_of(n);
        const size_t from = head.first * HEAD_DIM;
        barrier_expect(full(n), 3 * TOKENS * HEAD_DIM);
        copy_tile(head.keys, p.k + from, TOKENS * HEAD_DIM, full(n));
        copy_tile(head.values, p.v + from, TOKENS * HEAD_DIM, full(n));
        copy_tile(head.queries, p.q + from, TOKENS * HEAD_DIM, full(n));
    }

    // Values are turned in place by ordinary loads and stores; the stage's next bulk copy is ordered behind them by `free`.
    __device__ __forceinline__ void prepare(int n, int group) const {
        barrier_wait(full(n), phase(n));
        prepare_group(head_of(n), group, lane);
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(ready(n));
        }
    }
};
