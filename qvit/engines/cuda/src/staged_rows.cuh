// Rows of floats that a warp adds up come and go through shared memory.
//
// A warp's part [16, kBN] of a tile is cut into pieces of kPiece columns. What is added to them is copied into kSlots slots ahead of
// its use, those of the next tile already while this one's last are worked on, so that the memory has something to do during
// products too; sums are added to it in place and go out in whole lines. A row of a slot is 32 bytes longer than a piece: what
// fragments touch at a time, eight bytes a lane, is then in different banks.
#pragma once

constexpr int kPieces = kBN / kPiece, kPieceLine = 4 * kPiece + 32, kSlot = 16 * kPieceLine;
static_assert(kBN % kPiece == 0 && kPieces % kSlots == 0 && 32 % (kPiece / 4) == 0 && kPiece >= 16, "pieces cover a tile, and take turns");
static_assert(!(RESIDUAL && POSITION), "one thing is added");

constexpr bool kMoved = SCATTER == 1 || POSITION;  // rows go elsewhere than where they are in the product
constexpr int kMovedRows = kMoved ? 64 : 0;       // of this tile and the next: where they go, and rows of `position`

// The first row and column of a warp's part of a tile; the row is p.m or more where there is none. `moved`: where its rows go.
struct Place {
    int row, column;
    int* moved;
};

constexpr int kAcross = kPiece / 4, kAtOnce = 32 / kAcross;   // a lane moves 16 bytes; rows that a warp moves at once
constexpr bool kFullColumns = LDO % kBN == 0;

// Looks up where a part's rows go; a division or a load a row, so once.
__device__ __forceinline__ void move_rows(const GemmArgs& p, const Place& of, int lane) {
    if constexpr (kMoved) {
        const int r = of.row + lane;
        if (lane < 16 && r < p.m) {
            const int row = POSITION ? p.row_first + r % p.rows_in : 0;
            of.moved[lane] = POSITION ? r / p.rows_in * p.rows_out + row : float_row(p, r);
            of.moved[32 + lane] = row;
        }
        __syncwarp();
    }
}

// Calls `each(i, row, c)` for this lane's units of a piece: the i-th of its rows, where it goes, and the column.
template <class Each>
__device__ __forceinline__ void for_units(const GemmArgs& p, const Place& of, int piece, int lane, const Each& each) {
    const int c = of.column + piece * kPiece + 4 * (lane % kAcross), first = of.row + lane / kAcross, left = p.m - first;
    if (kFullColumns || c < p.n) {
#pragma unroll
        for (int i = 0; i < 16 / kAtOnce; i++) {
            if (i * kAtOnce < left) {
                each(i, kMoved ? of.moved[lane / kAcross + i * kAtOnce] : first, c);
            }
        }
    }
}

// Where a unit is in a matrix of floats: the row is that of `for_units`.
__device__ __forceinline__ size_t unit_at(int i, int row, int c) {
    return static_cast<size_t>(row) * LDO + c + (kMoved ? 0 : i * kAtOnce * LDO);
}

// Copies what is added to a piece into its slot; ends with its own group of copies, an empty one where there is nothing.
__device__ __forceinline__ void fetch_piece(const GemmArgs& p, const Place& of, int piece, int lane, unsigned char* slots) {
    unsigned char* const to = slots + piece % kSlots * kSlot + lane / kAcross * kPieceLine + 16 * (lane % kAcross);
    if constexpr (RESIDUAL || POSITION) {
        for_units(p, of, piece, lane, [&](int i, int row, int c) {
            const float* from = RESIDUAL ? p.residual + unit_at(i, row, c)
                                         : p.position + static_cast<size_t>(of.moved[32 + lane / kAcross + i * kAtOnce]) * LDO + c;
            copy_async(to + i * kAtOnce * kPieceLine, from, true);
        });
        copies_end_group();
    }
}

// The pieces that a warp starts with.
__device__ __forceinline__ void fetch_first(const GemmArgs& p, const Place& of, int lane, unsigned char* slots) {
#pragma unroll
    for (int piece = 0; piece < kSlots; piece++) {
        fetch_piece(p, of, piece, lane, slots);
    }
}

// Adds up one piece: `give(j, y)` gives the layer's output at fragment j of the tile. Then the sum goes out, and its slot is filled
// again.
template <class Give>
__device__ __forceinline__ void add_up_piece(const GemmArgs& p, const Place& of, const Place& next, int piece, int lane,
                                             unsigned char* slots, const Give& give) {
    unsigned char* const slot = slots + piece % kSlots * kSlot;
    unsigned char* const mine = slot + lane / 4 * kPieceLine + 8 * (lane % 4);
    if constexpr (RESIDUAL || POSITION) {
        copies_wait<kSlots - 1>();
        __syncwarp();
    }
#pragma unroll
    for (int k = 0; k < kPiece / 8; k++) {
        const int j = piece * (kPiece / 8) + k;
        float gamma[2];
        if constexpr (GAMMA) {
            const int c = of.column + 8 * j + 2 * (lane % 4);
            gamma[0] = gamma[1] = 0.0f;
            if (c < p.n) {
                load_pair(p.gamma + c, gamma);
            }
        }
        float y[4];
        give(j, y);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float* const at = reinterpret_cast<float*>(mine + 8 * half * kPieceLine + 32 * k);
            float other[2] = {0.0f, 0.0f};
            if constexpr (RESIDUAL || POSITION) {
                load_pair(at, other);
            }
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& one = y[2 * half + e];
                if constexpr (GAMMA) {
                    one = __fmul_rn(one, gamma[e]);
                }
                if constexpr (RESIDUAL || POSITION) {
                    one = __fadd_rn(other[e], one);
                }
                if constexpr (HALVED) {
                    one *= 0.5f;
                }
            }
            *reinterpret_cast<float2*>(at) = {y[2 * half], y[2 * half + 1]};
        }
    }
    __syncwarp();
    const unsigned char* const from = slot + lane / kAcross * kPieceLine + 16 * (lane % kAcross);
    for_units(p, of, piece, lane, [&](int i, int row, int c) {
        *reinterpret_cast<float4*>(static_cast<float*>(p.out) + unit_at(i, row, c)) =
            *reinterpret_cast<const float4*>(from + i * kAtOnce * kPieceLine);
    });
    __syncwarp();  // all of the slot has been read
    const int after = piece + kSlots;
    fetch_piece(p, after < kPieces ? of : next, after % kPieces, lane, slots);
}
