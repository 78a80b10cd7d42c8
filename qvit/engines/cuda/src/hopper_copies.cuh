// The copying warpgroup: tiles of operands, and what the epilogue knows of columns, on their way to buffers.
#pragma once

#include "hopper_tiles.cuh"

// Chunk `chunk` of `chunks` of `rows` rows from `row0` on, tile by tile.
__device__ __forceinline__ void copy_rows(unsigned char* to, const void* from, int row0, int rows, int chunk, Barrier* barrier,
                                          int chunks = kChunks) {
    for (int r = 0; r < rows; r += kTileRows) {
        copy_tile(to + r * kChunk, static_cast<const unsigned char*>(from) + code_at(row0 + r, chunk * kChunk, chunks), kTileBytes,
                  barrier);
    }
}

// The residual of a tile, on its way into the L2 cache while the tile is multiplied.
__device__ __forceinline__ void prefetch_residual(const GemmArgs& p, int row0, int column0) {
#if STAGED || DIRECT
    if (PREFETCH && RESIDUAL && SCATTER != 1) {
        const int rows = p.m - row0 < kTileM ? p.m - row0 : kTileM, columns = p.n - column0 < kBN ? p.n - column0 : kBN;
        const Stream* const from = p.residual + static_cast<size_t>(row0) * p.ldo + column0;
        const int together = columns == p.ldo ? 16 : 1;
        for (int r = 0; r < rows; r += together) {
            const int count = rows - r < together ? rows - r : together;
            prefetch(from + static_cast<size_t>(r) * p.ldo, count * columns * static_cast<int>(sizeof(Stream)));
        }
    }
#endif
}

// All of b, where it stays: constants, so before what the former kernel writes is there.
__device__ __forceinline__ void copy_all_of_b(const GemmArgs& p, const Buffers& of) {
    for (int chunk = 0; chunk < kChunks; chunk++) {
        for (int unit = 0; unit < kUnits; unit++) {
            const int at = BITS ? 0 : chunk * kUnits + unit;
            if (!BITS || chunk == 0) {
                barrier_expect(&of.barriers->full[at], kStage);
            }
            copy_rows(of.stages + at * kStage + (BITS ? chunk * kBytesB : 0), p.b, BITS ? 0 : unit * kPart, BITS ? kBN : kPart, chunk,
                      &of.barriers->full[at]);
        }
    }
}

// A lane of the copying warpgroup, one a team.
__device__ __forceinline__ void produce(const GemmArgs& p, const Buffers& of, Range range, const Tiles& tiles, int team) {
    Cursor<kStages> cursor;
    Cursor<kRowBuffers> row_cursor;
    int rows_phase = 0;
    Barriers* const barriers = of.barriers;
#if COLUMN_STAGES
    Cursor<kColumnStages> column_cursor;
#endif
    for (Walk walk(range.first, tiles); walk.tile < range.last; walk.next()) {
        const int tile = walk.tile, row0 = walk.row0, column0 = walk.column0;
        const bool fresh = tile == range.first || column0 == FIRST;
        for (int chunk = 0; chunk < kChunks; chunk++) {
            if ((!RESIDENT || fresh) && (!A_NIBBLES || chunk % 2 == 0)) {
                // The first round finds its buffers empty: it waits for the phase before the first.
                if (!RESIDENT) {
                    barrier_wait(&barriers->rows_empty[team][row_cursor.at()], row_cursor.phase() ^ 1);
                } else if (tile != range.first && (A_NIBBLES || chunk == 0)) {
                    barrier_wait(&barriers->rows_empty[team][row_cursor.at()], rows_phase);
                    rows_phase ^= static_cast<int>(!A_NIBBLES || row_cursor.at() == kRowChunks - 1);
                }
                if (HELD || A_NIBBLES) {
                    proxies_meet();  // ordinary loads have read them
                }
                Barrier* full = &barriers->rows_full[team][row_cursor.at()];
                barrier_expect(full, kBytesA / kTeams);
                copy_rows(of.rows + row_cursor.at() * kBytesA + team * kTileBytes, p.a, row0, kTileM, chunk * kRowChunks / kChunks, full,
                          kRowChunks);
                row_cursor.next();
            }
            if (chunk == 0) {
                prefetch_residual(p, row0, column0);
            }
            if (B_STAYS) {
                continue;
            }
            for (int unit = 0; unit < kUnits; unit++) {
                Barrier* full = &barriers->full[cursor.at()];
                unsigned char* stage = of.stages + cursor.at() * kStage;
                if (!BITS || chunk == 0) {
                    barrier_wait(&barriers->empty[cursor.at()], cursor.phase() ^ 1);
                    barrier_expect(full, kStage);
                }
                if (BITS) {
                    copy_rows(stage + chunk * kBytesB, p.b, column0, kBN, chunk, full);
                } else {
                    copy_rows(stage, p.b, column0 + unit * kPart, kPart, chunk, full);
                }
                if (!BITS || chunk == kChunks - 1) {
                    cursor.next();
                }
            }
        }
#if COLUMN_STAGES
        // Behind the tile's b, which is waited for sooner.
        Barrier* full = &barriers->columns_full[column_cursor.at()];
        barrier_wait(&barriers->columns_empty[column_cursor.at()], column_cursor.phase() ^ 1);
        proxies_meet();
        barrier_expect(full, kColumnBytes);
        copy_tile(of.columns + column_cursor.at() * kColumnBytes, columns_of(p, column0), kColumnBytes, full);
        column_cursor.next();
#endif
    }
}
