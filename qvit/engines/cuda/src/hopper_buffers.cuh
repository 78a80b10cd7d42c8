// Buffers of a block in shared memory, and what says whether they are full or empty. The includer says how large tiles are.
#pragma once

#include "hopper.cuh"

constexpr int kChunks = (DEPTH + kChunk - 1) / kChunk;  // of k
constexpr int kBytesA = kBM * kChunk;                    // of a chunk
// A buffer is for the columns of one instruction, 128 bytes of k; one-bit products go over all of k four times, so it is all of it.
constexpr int kUnits = BITS ? 1 : kParts;  // buffers of a chunk of b
constexpr int kBytesB = (BITS ? kBN : kPart) * kChunk;
constexpr int kStage = (BITS ? kChunks : 1) * kBytesB;
static_assert(RESIDENT || !BITS, "rows of one-bit products stay");
static_assert(!B_STAYS || kStages == (BITS ? 1 : kChunks * kUnits), "all of b has its place");
constexpr int kRowChunks = A_NIBBLES ? kChunks / 2 : kChunks;  // tiles of a row of a, where each may have twice as many k
static_assert(!A_NIBBLES || (DEPTH % kNibbleChunk == 0 && kUnits == 1 && !BITS), "two tiles of b meet one of a");
constexpr int kRowBuffers = RESIDENT ? kRowChunks : kRowStages;
constexpr int kTeams = B_STAYS ? kGroups : 1;  // warpgroups that have tiles of their own
constexpr int kTileM = kBM / kTeams;           // rows of such a tile

struct Barriers {
    Barrier full[kStages], empty[kStages];
    Barrier rows_full[kTeams][kRowBuffers], rows_empty[kTeams][kRowBuffers];  // of the last the first alone, where bytes stay
#if COLUMN_STAGES
    Barrier columns_full[COLUMN_STAGES], columns_empty[COLUMN_STAGES];
#endif
};

#if COLUMN_STAGES
static_assert(kColumnBytes == COLUMN_BYTES * kBN, "the host has made room for what the epilogue knows of columns");
constexpr int kColumnStages = COLUMN_STAGES;
#else
constexpr int kColumnStages = 1;
#endif

struct Buffers {
    unsigned char *rows, *stages, *columns;
    Barriers* barriers;
};

// Counts through buffers; the phase turns with every round.
template <int kCount>
struct Cursor {
    static constexpr bool kBits = (kCount & (kCount - 1)) == 0;  // both are bits of one number
    unsigned turn = 0, round = 0;

    __device__ __forceinline__ int at() const { return static_cast<int>(kBits ? turn % kCount : turn); }
    __device__ __forceinline__ int phase() const { return static_cast<int>(kBits ? turn / kCount % 2 : round); }
    // Before a tile that goes through kTile buffers: where that is whole rounds, the compiler is told so.
    template <int kTile>
    __device__ __forceinline__ void begin() {
        if (kBits) {
            turn = kTile % (2 * kCount) == 0 ? 0 : kTile % kCount == 0 ? turn & kCount : turn;
        } else {
            turn = kTile % kCount == 0 ? 0 : turn;
            round = kTile % (2 * kCount) == 0 ? 0 : round;
        }
    }
    __device__ __forceinline__ void next() {
        if (kBits) {
            turn++;
        } else if (++turn == kCount) {
            turn = 0;
            round ^= 1;
        }
    }
};
