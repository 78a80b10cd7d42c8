// A lane's codes behind an activation, which go from registers to memory: columns are permuted, so that those that it has of a row lie
// next to each other.
#pragma once

#include "layout.cuh"

// Where a warp's codes are. Its part is in one tile, so what depends on the lane alone is not computed for every tile of the
// product.
struct Out {
    unsigned char* tile;
    int line, byte;  // row of the tile, of eight; byte of the row

    __device__ __forceinline__ Out(const GemmArgs& p, int row0, int column0, int lane) {
        static_assert(kTileRows % kWM == 0 && kChunk % kWN == 0, "a warp's part is in one tile");
        constexpr int kAcross = OUT_BITS ? 4 * kChunk : OUT_NIBBLES ? kNibbleChunk : kChunk;  // columns of a tile
        const size_t index = static_cast<size_t>(row0 / kTileRows) * p.ldo + column0 / kAcross;
        const int column = kAcross == kWN ? 0 : column0 % kAcross;
        tile = static_cast<unsigned char*>(p.out) + index * kTileBytes + row0 % kTileRows * kChunk;
        line = lane / 4;
        byte = OUT_BITS      ? bit_at(column, 1) + lane % 4 * (kWN / 32)
               : OUT_NIBBLES ? column / 2 + lane % 4 * (kWN / 8)
                             : column + lane % 4 * (kWN / 4);
    }
    // `more`: bytes from the lane's first one on.
    __device__ __forceinline__ unsigned char* at(int row, int half, int more) const {
        const int b = byte + more;
        return tile + (16 * row + 8 * half) * kChunk + (line * kChunk + ((b / 16) ^ line) * 16 + b % 16);
    }
};

#if OUT_BITS
// One of two bits of each code, from a lane's two groups.
__device__ __forceinline__ uint32_t plane_of(uint32_t first, uint32_t second) {
    return (first & 0x55555555u) | (second & 0xAAAAAAAAu);
}

// A lane's bits of a plane, of kWN / 4 columns; where these are 16, in the lowest and the third byte.
__device__ __forceinline__ void store_plane(unsigned char* to, uint32_t bits) {
    if (kWN / 4 == 32) {
        *reinterpret_cast<uint32_t*>(to) = bits;
    } else {
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(__byte_perm(bits, 0, 0x4420));
    }
}
#endif
