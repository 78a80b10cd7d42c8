// The sums of a block's tile in shared memory, where all shares of k meet and all threads take their parts of the epilogue.
#pragma once

// Whole numbers from one row of a share to the next: a quarter of a warp's rows, two sums a lane, are in different banks.
constexpr int kSumLine = (kBN + 23) / 32 * 32 + 8;
constexpr int kSumBytes = 4 * kSplit * kBM * kSumLine;

struct Sums {
    int* at;  // [kSplit][kBM][kSumLine]

    __device__ __forceinline__ void write(int share, int row, int column, int left, int right) const {
        *reinterpret_cast<uint2*>(at + (share * kBM + row) * kSumLine + column) = {static_cast<uint32_t>(left),
                                                                                  static_cast<uint32_t>(right)};
    }

    // Of kCount neighbours, two or four.
    template <int kCount>
    __device__ __forceinline__ void read(int row, int column, int (&out)[kCount]) const {
#pragma unroll
        for (int e = 0; e < kCount; e++) {
            out[e] = 0;
        }
#pragma unroll
        for (int share = 0; share < kSplit; share++) {
            const int* const from = at + (share * kBM + row) * kSumLine + column;
            if constexpr (kCount == 4) {
                const int4 four = *reinterpret_cast<const int4*>(from);
                out[0] += four.x, out[1] += four.y, out[2] += four.z, out[3] += four.w;
            } else {
                const uint2 two = *reinterpret_cast<const uint2*>(from);
                out[0] += static_cast<int>(two.x), out[1] += static_cast<int>(two.y);
            }
        }
    }
};

// Tasks of four columns of a row, one after the other along a row: a thread has the same columns in all of its rows.
constexpr int kFours = kBN / 4;
constexpr int kAtOnce = kThreads / kFours;                  // rows
constexpr int kTurns = (kBM + kAtOnce - 1) / kAtOnce;       // of a thread
static_assert(kAtOnce > 0, "there are as many threads as a row has fours");

// What a thread does: its columns from `column` on, and in turn `i` a row of the tile, kBM or more where there is none left.
struct Task {
    int thread, column, first;

    __device__ __forceinline__ Task() : thread(thread_again()), column(thread % kFours * 4), first(thread / kFours) {}
    __device__ __forceinline__ int row(int i) const { return first < kAtOnce ? first + kAtOnce * i : kBM; }
};
