// Rows of floats that a warp adds up come and go through shared memory.
//
// A warp's part [16, kBN] of a tile is cut into pieces of kPiece columns. What is added to them is copied into kSlots slots ahead of
// its use, those of the next tile already while this one's last are worked on, so that the memory has something to do during
// products too; sums are added to it in place and go out in whole lines. What fragments touch at a time, two values a lane of eight
// rows, is in different banks: a row of float32 is eight values longer than a piece, and of float16 the 16-byte units of a row are
// permuted by the row.
#pragma once

// What is added comes as it lies in memory: values of the stream, or a position in float32. Of float16 there are as many bytes ahead,
// so up to twice as many pieces.
using Added = StreamOf<OUT_HALF && !POSITION>::type;
constexpr int kValue = sizeof(Added), kPieces = kBN / kPiece;
constexpr int slots_of(int most) { return kPieces % most == 0 ? most : slots_of(most - 1); }
constexpr int kSlotCount = slots_of(kValue == 4 ? kSlots : 2 * kSlots < kPieces ? 2 * kSlots : kPieces);
constexpr int kPieceLine = kValue * kPiece + (kValue == 4 ? 32 : 0), kSlot = 16 * kPieceLine, kSlotBytes = kSlotCount * kSlot;  // of a warp
static_assert(kBN % kPiece == 0 && (kValue != 4 || kPieces % kSlots == 0) && 32 % (kPiece / 4) == 0 && kPiece >= 16, "pieces cover a tile, and take turns");
static_assert(!(RESIDUAL && POSITION), "one thing is added");

constexpr bool kMoved = SCATTER == 1 || POSITION;  // rows go elsewhere than where they are in the product
constexpr int kMovedRows = kMoved ? 64 : 0;       // of this tile and the next: where they go, and rows of `position`

// The first row and column of a warp's part of a tile; the row is p.m or more where there is none. `moved`: where its rows go.
struct Place {
    int row, column;
    int* moved;
};

// A lane moves 16 bytes of values T.
template <class T>
constexpr int kWide = 16 / sizeof(T);
template <class T>
constexpr int kAcross = kPiece / kWide<T>;  // lanes of a row
template <class T>
constexpr int kRowsAtOnce = 32 / kAcross<T>;
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

// By what the 16-byte units of a row of a slot are permuted. Rows eight apart have the same.
__device__ __forceinline__ int turn_of(int row) {
    constexpr int kUnits = kPiece / 8, kPeriod = kUnits < 8 ? 8 / kUnits : 1;  // rows of 128 bytes
    return kValue == 4 ? 0 : row / kPeriod % (kUnits < 8 ? kUnits : 8);
}
// Where such a unit is, of the i-th of a lane's rows of values T.
template <class T>
__device__ __forceinline__ int unit_in_slot(int first, int i, int unit) {
    const int apart = i * kRowsAtOnce<T>, row = apart % 8 == 0 ? first : first + apart;
    return first * kPieceLine + 16 * (unit ^ turn_of(row)) + apart * kPieceLine;
}

// Calls `each(i, row, c)` for this lane's units of a piece: the i-th of its rows, where it goes, and the column.
template <class T, class Each>
__device__ __forceinline__ void for_units(const GemmArgs& p, const Place& of, int piece, int lane, const Each& each) {
    const int c = of.column + piece * kPiece + kWide<T> * (lane % kAcross<T>), first = of.row + lane / kAcross<T>, left = p.m - first;
    if (kFullColumns || c < p.n) {
#pragma unroll
        for (int i = 0; i < 16 / kRowsAtOnce<T>; i++) {
            if (i * kRowsAtOnce<T> < left) {
                each(i, kMoved ? of.moved[lane / kAcross<T> + i * kRowsAtOnce<T>] : first, c);
            }
        }
    }
}

// Where a unit is in a matrix of values: the row is that of `for_units`.
template <class T>
__device__ __forceinline__ size_t unit_at(int i, int row, int c) {
    return static_cast<size_t>(row) * LDO + c + (kMoved ? 0 : i * kRowsAtOnce<T> * LDO);
}

// Copies what is added to a piece into its slot; ends with its own group of copies, an empty one where there is nothing.
__device__ __forceinline__ void fetch_piece(const GemmArgs& p, const Place& of, int piece, int lane, unsigned char* slots) {
    unsigned char* const to = slots + piece % kSlotCount * kSlot;
    const int first = lane / kAcross<Added>, unit = lane % kAcross<Added>;
    if constexpr (RESIDUAL || POSITION) {
        for_units<Added>(p, of, piece, lane, [&](int i, int row, int c) {
            const void* from;
            if constexpr (RESIDUAL) {
                from = p.residual + unit_at<Added>(i, row, c);
            } else {
                from = p.position + static_cast<size_t>(of.moved[32 + first + i * kRowsAtOnce<Added>]) * LDO + c;
            }
            copy_async(to + unit_in_slot<Added>(first, i, unit), from, true);
        });
        copies_end_group();
    }
}

// The pieces that a warp starts with.
__device__ __forceinline__ void fetch_first(const GemmArgs& p, const Place& of, int lane, unsigned char* slots) {
#pragma unroll
    for (int piece = 0; piece < kSlotCount; piece++) {
        fetch_piece(p, of, piece, lane, slots);
    }
}

// Adds up one piece: `give(j, y)` gives the layer's output at fragment j of the tile. Then the sum goes out, and its slot is filled
// again.
template <class Give>
__device__ __forceinline__ void add_up_piece(const GemmArgs& p, const Place& of, const Place& next, int piece, int lane,
                                             unsigned char* slots, const Give& give) {
    unsigned char* const slot = slots + piece % kSlotCount * kSlot;
    unsigned char* const mine = slot + lane / 4 * kPieceLine + 2 * kValue * (lane % 4);
    const int turn = 16 * turn_of(lane / 4);
    if constexpr (RESIDUAL || POSITION) {
        copies_wait<kSlotCount - 1>();
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
            unsigned char* const at = mine + 8 * half * kPieceLine + ((8 * kValue * k) ^ turn);
            float other[2] = {0.0f, 0.0f};
            if constexpr (RESIDUAL || POSITION) {
                load_values(reinterpret_cast<const Added*>(at), other);
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
            const float pair[2] = {y[2 * half], y[2 * half + 1]};
            store_values(reinterpret_cast<Stream*>(at), pair);  // a pair of float16 in place of a position's: in its first half
        }
    }
    __syncwarp();
    constexpr int kApart = kValue / sizeof(Stream);  // what is added, and so a place of the slot, may be twice as long as the sum
    const int first = lane / kAcross<Stream>, unit = kApart * (lane % kAcross<Stream>);
    for_units<Stream>(p, of, piece, lane, [&](int i, int row, int c) {
        const uint4* const sums = reinterpret_cast<const uint4*>(slot + unit_in_slot<Stream>(first, i, unit));
        uint4 out = sums[0];
        if constexpr (kApart == 2) {
            const uint4 more = sums[1];
            out = {out.x, out.z, more.x, more.z};
        }
        *reinterpret_cast<uint4*>(static_cast<Stream*>(p.out) + unit_at<Stream>(i, row, c)) = out;
    });
    __syncwarp();  // all of the slot has been read
    const int after = piece + kSlotCount;
    fetch_piece(p, after < kPieces ? of : next, after % kPieces, lane, slots);
}
