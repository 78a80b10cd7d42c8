// Products of codes on Hopper: wgmma from shared memory, tiles copied whole, and a warpgroup that does nothing but copy.
//
// A block takes kGroups x 64 rows of a; each of its warpgroups computes 64 of them against kBN columns at a time. Blocks run as
// many as there are multiprocessors; each has a range of tiles, row block by row block, so that a's rows stay in shared memory
// (RESIDENT) while b's tiles stream past in kStages buffers, or b stays (B_STAYS) while rows stream past, or both stream.
// Warpgroups meet at barriers of buffers only: while one is busy with its epilogue, others multiply. Where b stays they share
// nothing else: each has tiles of 64 rows of its own, and a warp that copies them, so that they fall out of step.
//
// OVERLAP: what follows a tile's products is done, piece by piece, while the next tile's are made: a warp has the sums of both.
//
// Compiled once a shape and epilogue; the constants in capitals come from `qvit/engines/cuda/products.py` and `tiles.py`.
constexpr int kBM = 64 * kGroups;
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kRows = 1, kColumns = kBN / 8;  // a warp's part, in fragments
constexpr int kWM = 16, kWN = kBN;
constexpr int kPart = kBN > 256 ? 192 : kBN, kParts = kBN / kPart;  // columns of one instruction
// The copying warpgroup gives registers back, the others take them: of those that the block has from the start, a multiple of 8 for
// each thread. More than there are would be waited for without end.
constexpr int kCopying = 24, kAtFirst = 65536 / kThreads / 8 * 8;
constexpr int kRegisters = kGroups == 1 ? 112 : (kAtFirst * kThreads - kCopying * 128) / (128 * kGroups) / 8 * 8;
constexpr bool kTradesRegisters = kGroups > 1;

#include "epilogue.cuh"
#include "hopper_copies.cuh"
#include "hopper_products.cuh"

static_assert(!OVERLAP || (STAGED && kParts == 1), "what is put off passes through shared memory");

// What is behind the buffers in shared memory.
struct Behind {
    unsigned char *lines, *slots;
    float* constants;
    int* moved;
};

constexpr bool kHasLines = !COLUMN_STAGES && !((STAGED || DIRECT) && EPILOGUE == 0);

#if !STAGED
constexpr int kSlotBytes = 0, kMovedRows = 0;
#endif
#if !DIRECT
constexpr int kConstants = 0;
#endif

// A warpgroup's products and what follows them.
__device__ __forceinline__ void consume(const GemmArgs& p, const Buffers& of, const Behind& behind, Range range,
                                        const Tiles& tiles, int team, int warp, int lane) {
    Reader reader = {of, operand(of.rows + warp / 4 * kTileBytes), operand(of.stages), lines_of(of.rows, warp, lane),
                     team, lane, false};
    reader.less = p.m < 0 ? 0 : -2;
    const int own = warp % (4 * kGroups / kTeams);  // which of the team's warps
    Sums sums;
    unsigned char* const lines = behind.lines + warp * kWM * kLine;
#if STAGED
    unsigned char* const slots = behind.slots + warp * kSlotBytes;
    int* const moved = behind.moved + warp * kMovedRows;
    const auto place = [&](int tile) -> Place {
        const bool there = range.first <= tile && tile < range.last;
        return {there ? tiles.row0(tile) + 16 * own : p.m, there ? tiles.column0(tile) : 0, moved + (tile & 1) * 16};
    };
    if (!OVERLAP) {
        move_rows(p, place(range.first), lane);
    }
    fetch_first(p, place(range.first - OVERLAP), lane, slots);
#endif
#if OVERLAP
    Sums sums_before = {};  // of the tile before: of none, at first
#endif
#if COLUMN_STAGES
    Cursor<kColumnStages> column_cursor;
#endif
    for (Walk walk(range.first, tiles); walk.tile < range.last; walk.next()) {
        const int tile = walk.tile;
        reader.fresh = tile == range.first || walk.column0 == FIRST;
        reader.last = walk.last_of_rows();
        reader.rows_phase ^= static_cast<int>(reader.fresh);
#if STAGED
        move_rows(p, place(tile + 1 - OVERLAP), lane);
#elif DIRECT
        Part part;
        if (RESIDUAL_EARLY) {
            part.begin(p, walk.row0 + 16 * own, lane);
        }
#endif
#if OVERLAP
        const Place before = place(tile - 1), now = place(tile);
        multiply_all(reader, sums, [&](int slice) {
#pragma unroll
            for (int piece = slice * kPieces / kSlices; piece < (slice + 1) * kPieces / kSlices; piece++) {
                finish_piece(p, before, now, piece, lane, slots, sums_before.fragments);
            }
        });
        sums_before = sums;
#else
        multiply_all(reader, sums, [](int) {});
#endif
        if (RESIDENT && !A_NIBBLES && !HELD && reader.last) {
            reader.release_rows(0);
        }
#if DIRECT
        if (!RESIDUAL_EARLY) {
            part.begin(p, walk.row0 + 16 * own, lane);
        }
#endif
#if STAGED && !OVERLAP
        finish(p, place(tile), place(tile + 1), lane, slots, sums.fragments);
#elif OVERLAP
#elif DIRECT
        finish(p, part, lane, lines, behind.constants, sums.fragments);
#elif COLUMN_STAGES
        barrier_wait(&of.barriers->columns_full[column_cursor.at()], column_cursor.phase());
        finish_columns<true>(p, walk.row0 + 16 * own, walk.column0, lane, of.columns + column_cursor.at() * kColumnBytes,
                             sums.fragments);
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(&of.barriers->columns_empty[column_cursor.at()]);
        }
        column_cursor.next();
#else
        finish(p, walk.row0 + 16 * own, walk.column0, lane, lines, sums.fragments);
#endif
        __syncwarp();
    }
#if OVERLAP
    finish(p, place(range.last - 1), place(range.last), lane, slots, sums_before.fragments);
#endif
}

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads, 1) kernel(const QVIT_CONSTANT GemmArgs p) {
    QVIT_SHARED(memory);
    const int lane = threadIdx.x % 32, warp = of_first_lane(threadIdx.x / 32);
    Buffers of;
    of.rows = memory;
    of.stages = of.rows + kRowBuffers * kBytesA;
    of.columns = of.stages + kStages * kStage;
    Behind behind;
    behind.slots = of.columns + COLUMN_STAGES * COLUMN_BYTES * kBN;
    behind.constants = reinterpret_cast<float*>(behind.slots + 4 * kGroups * kSlotBytes);
    behind.moved = reinterpret_cast<int*>(behind.constants + kConstants);
    behind.lines = reinterpret_cast<unsigned char*>(behind.moved + 4 * kGroups * kMovedRows);
    of.barriers = reinterpret_cast<Barriers*>(behind.lines + (kHasLines ? 4 * kGroups * kWM * kLine : 0));
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            barrier_init(&of.barriers->full[i], 1);
            barrier_init(&of.barriers->empty[i], 4 * kGroups);
        }
        for (int i = 0; i < kTeams * kRowBuffers; i++) {
            barrier_init(&of.barriers->rows_full[0][i], 1);
            barrier_init(&of.barriers->rows_empty[0][i], 4 * kGroups / kTeams);
        }
#if COLUMN_STAGES
        for (int i = 0; i < kColumnStages; i++) {
            barrier_init(&of.barriers->columns_full[i], 1);
            barrier_init(&of.barriers->columns_empty[i], 4 * kGroups);
        }
#endif
        barriers_ready();
    }
#if DIRECT
    load_constants(p, behind.constants);
#endif
    __syncthreads();
    if (B_STAYS && threadIdx.x == 128 * kGroups) {
        copy_all_of_b(p, of);
    }
    __syncwarp();
    await_former_kernel();
    const Tiles tiles = {(p.m + kTileM - 1) / kTileM, DIRECT ? 1 : (p.n - FIRST + kBN - 1) / kBN};
    const int team = kTeams == 1 ? 0 : warp < 4 * kGroups ? warp / 4 : warp - 4 * kGroups;
    const Range range = range_of(tiles, team);
    if (warp >= 4 * kGroups) {
        if (kTradesRegisters) {
            registers_down<kCopying>();
        }
        if (warp < 4 * kGroups + kTeams && lane == 0) {
            produce(p, of, range, tiles, team);
        }
    } else {
        if (kTradesRegisters) {
            registers_up<kRegisters>();
        }
        consume(p, of, behind, range, tiles, team, warp, lane);
    }
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const GemmArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
