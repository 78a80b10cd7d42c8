// Which tiles of a product a block, or a warpgroup of it, goes through.
#pragma once

#include "hopper_buffers.cuh"

// All tiles of the product, or those from column FIRST on: so many a row block, numbered row block by row block.
struct Tiles {
    int row_blocks, across;

    __device__ __forceinline__ int row0(int tile) const { return tile / across * kTileM; }
    __device__ __forceinline__ int column0(int tile) const { return FIRST + tile % across * kBN; }
};

// A team's tiles.
struct Range {
    int first, last;
};

// Even shares.
__device__ __forceinline__ Range range_of(const Tiles& tiles, int team) {
    const int blocks = static_cast<int>(gridDim.x), teams = kTeams * blocks, own = team * blocks + static_cast<int>(blockIdx.x);
    const int all = tiles.row_blocks * tiles.across;
    const int some = all / teams, more = all % teams, first = some * own + (own < more ? own : more);
    return {first, first + some + (own < more)};
}

// A tile of the range, without a division from one to the next.
struct Walk {
    int tile, tiles_n, row0, column0;

    __device__ __forceinline__ Walk(int first, const Tiles& tiles)
        : tile(first), tiles_n(tiles.across), row0(tiles.row0(first)), column0(tiles.column0(first)) {}
    __device__ __forceinline__ bool last_of_rows() const { return column0 == FIRST + (tiles_n - 1) * kBN; }
    __device__ __forceinline__ void next() {
        const bool wraps = last_of_rows();
        row0 = wraps ? row0 + kTileM : row0;
        column0 = wraps ? FIRST : column0 + kBN;
        tile++;
    }
};
