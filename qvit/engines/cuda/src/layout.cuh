// How codes lie in memory: as the tensor cores' copies of them in shared memory do.
//
// Rows of 128 bytes, 64 of them a tile, and the 16-byte pieces of a row permuted by the row, so that eight rows' equal pieces are
// in different banks:
//
//     tile (row / 64, column / 128)    8192 bytes, tiles of one row block next to each other
//       line row % 64                  128 bytes
//         piece p of it                at place p ^ row % 8
//
// A tile is one contiguous copy, and what was copied is in the layout that ldmatrix likes and wgmma knows as its 128-byte swizzle.
#pragma once

#include "warp.cuh"

constexpr int kTileRows = 64, kChunk = 128, kTileBytes = kTileRows * kChunk;

// Where a code is; `chunks`: tiles a row of the matrix has.
__device__ __forceinline__ size_t code_at(int row, int column, int chunks) {
    const size_t tile = static_cast<size_t>(row / kTileRows) * chunks + column / kChunk;
    return tile * kTileBytes + row % kTileRows * kChunk + ((column % kChunk / 16) ^ (row % 8)) * 16 + column % 16;
}

// Two-bit codes for one-bit products lie as planes: 256 columns are 64 bytes of a row, first their high bits, then their low ones.
// The byte of a column's bit:
__device__ __forceinline__ int bit_at(int column, int plane) { return column / 256 * 64 + (1 - plane) * 32 + column % 256 / 8; }

// Codes of up to four bits may lie two a byte: of eight columns four bytes, the first four in their lower halves, the others in
// their higher ones. A tile then has so many columns:
constexpr int kNibbleChunk = 2 * kChunk;

