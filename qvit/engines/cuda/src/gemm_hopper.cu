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
// Compiled once a shape and epilogue; the constants in capitals come from `qvit/engines/cuda/plan.py` and `tiles.py`.
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
#include "hopper.cuh"

constexpr int kChunks = (DEPTH + kChunk - 1) / kChunk;  // of k
constexpr int kBytesA = kBM * kChunk;                    // of a chunk
// A buffer is for the columns of one instruction, 128 bytes of k; one-bit products go over all of k four times, so it is all of it.
constexpr int kUnits = BITS ? 1 : kParts;  // buffers of a chunk of b
constexpr int kBytesB = (BITS ? kBN : kPart) * kChunk;
constexpr int kStage = (BITS ? kChunks : 1) * kBytesB;
static_assert(RESIDENT || !BITS, "rows of one-bit products stay");
static_assert(!B_STAYS || kStages == (BITS ? 1 : kChunks * kUnits), "all of b has its place");
constexpr int kRowBuffers = RESIDENT ? kChunks : kRowStages;
constexpr int kTeams = B_STAYS ? kGroups : 1;  // warpgroups that have tiles of their own
constexpr int kTileM = kBM / kTeams;           // rows of such a tile

struct Barriers {
    Barrier full[kStages], empty[kStages];
    Barrier rows_full[kTeams][kRowBuffers], rows_empty[kTeams][kRowBuffers];  // of the last the first alone, where RESIDENT
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
    int at = 0, phase = 0;
    // Before a tile that goes through kTile buffers: where that is whole rounds, the compiler is told so.
    template <int kTile>
    __device__ __forceinline__ void begin() {
        at = kTile % kCount == 0 ? 0 : at;
        phase = kTile % (2 * kCount) == 0 ? 0 : phase;
    }
    __device__ __forceinline__ void next() {
        if (++at == kCount) {
            at = 0;
            phase ^= 1;
        }
    }
};

// All tiles of the product: so many a row block, numbered row block by row block.
struct Tiles {
    int row_blocks, across;

    __device__ __forceinline__ int row0(int tile) const { return tile / across * kTileM; }
    __device__ __forceinline__ int column0(int tile) const { return tile % across * kBN; }
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
    __device__ __forceinline__ bool last_of_rows() const { return column0 == (tiles_n - 1) * kBN; }
    __device__ __forceinline__ void next() {
        const bool wraps = last_of_rows();
        row0 = wraps ? row0 + kTileM : row0;
        column0 = wraps ? 0 : column0 + kBN;
        tile++;
    }
};

// Chunk `chunk` of `rows` rows from `row0` on, tile by tile.
__device__ __forceinline__ void copy_rows(unsigned char* to, const void* from, int row0, int rows, int chunk, Barrier* barrier) {
    for (int r = 0; r < rows; r += kTileRows) {
        copy_tile(to + r * kChunk, static_cast<const unsigned char*>(from) + code_at(row0 + r, chunk * kChunk, kChunks), kTileBytes,
                  barrier);
    }
}

// The residual of a tile, on its way into the L2 cache while the tile is multiplied.
__device__ __forceinline__ void prefetch_residual(const GemmArgs& p, int row0, int column0) {
#if STAGED || DIRECT
    if (PREFETCH && RESIDUAL && SCATTER != 1) {
        const int rows = p.m - row0 < kTileM ? p.m - row0 : kTileM, columns = p.n - column0 < kBN ? p.n - column0 : kBN;
        const float* const from = p.residual + static_cast<size_t>(row0) * p.ldo + column0;
        const int together = columns == p.ldo ? 16 : 1;
        for (int r = 0; r < rows; r += together) {
            const int count = rows - r < together ? rows - r : together;
            prefetch(from + static_cast<size_t>(r) * p.ldo, count * columns * static_cast<int>(sizeof(float)));
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
        const bool fresh = tile == range.first || column0 == 0;
        for (int chunk = 0; chunk < kChunks; chunk++) {
            if (!RESIDENT || fresh) {
                // The first round finds its buffers empty: it waits for the phase before the first.
                if (!RESIDENT) {
                    barrier_wait(&barriers->rows_empty[team][row_cursor.at], row_cursor.phase ^ 1);
                } else if (chunk == 0 && tile != range.first) {
                    barrier_wait(&barriers->rows_empty[team][0], rows_phase);
                    rows_phase ^= 1;
                }
                Barrier* full = &barriers->rows_full[team][row_cursor.at];
                barrier_expect(full, kBytesA / kTeams);
                copy_rows(of.rows + row_cursor.at * kBytesA + team * kTileBytes, p.a, row0, kTileM, chunk, full);
                row_cursor.next();
            }
            if (chunk == 0) {
                prefetch_residual(p, row0, column0);
            }
            if (B_STAYS) {
                continue;
            }
            for (int unit = 0; unit < kUnits; unit++) {
                Barrier* full = &barriers->full[cursor.at];
                unsigned char* stage = of.stages + cursor.at * kStage;
                if (!BITS || chunk == 0) {
                    barrier_wait(&barriers->empty[cursor.at], cursor.phase ^ 1);
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
        Barrier* full = &barriers->columns_full[column_cursor.at];
        barrier_wait(&barriers->columns_empty[column_cursor.at], column_cursor.phase ^ 1);
        barrier_expect(full, kColumnBytes);
        copy_tile(of.columns + column_cursor.at * kColumnBytes, columns_of(p, column0), kColumnBytes, full);
        column_cursor.next();
#endif
    }
}

static_assert(!OVERLAP || (STAGED && kParts == 1), "what is put off passes through shared memory");

union Sums {
    int parts[kParts][kPart / 2];
    int fragments[kRows][kColumns][4];
};

__device__ __forceinline__ void settle(Sums& sums) {
#pragma unroll
    for (int part = 0; part < kParts; part++) {
        settle(sums.parts[part]);
    }
}

// Where a warpgroup is in its work: the buffers it reads, and what it has to say when they have been read.
struct Reader {
    const Buffers& of;
    Operand rows, stages;  // the first ones
    int team, lane;
    bool fresh;  // these rows are read for the first time
    int rows_phase = 1;
    Cursor<kStages> cursor;
    Cursor<kRowBuffers> row_cursor;  // where rows do not stay

    // This warpgroup's rows of a chunk.
    __device__ __forceinline__ Operand await_rows(int chunk) const {
        const int at = RESIDENT ? chunk : row_cursor.at;
        if (!RESIDENT || fresh) {
            barrier_wait(&of.barriers->rows_full[team][at], RESIDENT ? rows_phase : row_cursor.phase);
        }
        return advance(rows, at * kBytesA);
    }
    __device__ __forceinline__ Operand await_stage() const {
        barrier_wait(&of.barriers->full[cursor.at], B_STAYS ? 0 : cursor.phase);
        return advance(stages, cursor.at * kStage);
    }
    __device__ __forceinline__ void release(int stage) const {
        if (!B_STAYS && lane == 0) {
            barrier_arrive(&of.barriers->empty[stage]);
        }
    }
    __device__ __forceinline__ void release_rows(int at) const {
        if (lane == 0) {
            barrier_arrive(&of.barriers->rows_empty[team][at]);
        }
    }
};

#if BITS

// One plane of a against one of b, over all of k.
__device__ __forceinline__ void multiply_planes(Sums& sums, Operand rows, Operand stage, int plane_a, int plane_b, bool add) {
#pragma unroll
    for (int k = 0; k < DEPTH; k += 64) {
        const int chunk = k / kChunk, from = k % kChunk;
        const Operand a = advance(rows, chunk * kBytesA), b = advance(stage, chunk * kBytesB);
#pragma unroll
        for (int part = 0; part < kParts; part++) {
            warpgroup_multiply_bits<kPart>(sums.parts[part], advance(a, from + 32 * (1 - plane_a)),
                                           advance(b, part * kPart * kChunk + from + 32 * (1 - plane_b)), add || k > 0);
        }
    }
}

// What `issue` issues, from begin to end; `meanwhile` is done before they are waited for.
template <class Issue, class Meanwhile>
__device__ __forceinline__ void multiply_and_wait(Sums& sums, const Issue& issue, const Meanwhile& meanwhile) {
    settle(sums);
    products_begin();
    issue();
    products_end_group();
    meanwhile();
    products_wait<0>();
    settle(sums);
}

template <class Change>
__device__ __forceinline__ void change(Sums& sums, const Change& how) {
#pragma unroll
    for (int part = 0; part < kParts; part++) {
#pragma unroll
        for (int i = 0; i < kPart / 2; i++) {
            sums.parts[part][i] = how(sums.parts[part][i]);
        }
    }
}

// a = 2 a1 + a0 and b = -2 b1 + b0, so a b = -2 (2 a1 b1 + a0 b1) + 2 a1 b0 + a0 b0. Twice a product is the product twice: a half
// more of them, which the tensor cores have time for, and two waits and one pass over the sums in place of four and three.
constexpr int kSlices = TWICE ? 2 : 4;
template <class Meanwhile>
__device__ __forceinline__ void multiply_all(Reader& reader, Sums& sums, const Meanwhile& meanwhile) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
        reader.await_rows(chunk);
    }
    const Operand stage = reader.await_stage(), rows = reader.rows;
    const auto multiply = [&](int plane_a, int plane_b, bool add) { multiply_planes(sums, rows, stage, plane_a, plane_b, add); };
    if (TWICE) {
        multiply_and_wait(
            sums, [&] { multiply(1, 1, false), multiply(1, 1, true), multiply(0, 1, true); }, [&] { meanwhile(0); });
        change(sums, [](int x) { return -2 * x; });
        multiply_and_wait(
            sums, [&] { multiply(1, 0, true), multiply(1, 0, true), multiply(0, 0, true); }, [&] { meanwhile(1); });
    } else {
        multiply_and_wait(sums, [&] { multiply(1, 1, false); }, [&] { meanwhile(0); });
        change(sums, [](int x) { return 2 * x; });
        multiply_and_wait(sums, [&] { multiply(0, 1, true); }, [&] { meanwhile(1); });
        change(sums, [](int x) { return -x; });
        multiply_and_wait(sums, [&] { multiply(1, 0, true); }, [&] { meanwhile(2); });
        change(sums, [](int x) { return 2 * x; });
        multiply_and_wait(sums, [&] { multiply(0, 0, true); }, [&] { meanwhile(3); });
    }
    reader.release(reader.cursor.at);
    reader.cursor.next();
}

#else

// `meanwhile(slice)` is called kSlices times while products are made.
constexpr int kSlices = kChunks;
template <class Meanwhile>
__device__ __forceinline__ void multiply_all(Reader& reader, Sums& sums, const Meanwhile& meanwhile) {
    int before = -1, rows_before = -1;
    reader.cursor.begin<kChunks * kUnits>();
    reader.row_cursor.begin<kChunks>();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
        const Operand a = reader.await_rows(chunk);
#pragma unroll
        for (int part = 0; part < kParts; part++) {
            const Operand b = reader.await_stage();
            settle(sums);
            products_begin();
#pragma unroll
            for (int k = 0; k < kChunk; k += 32) {
                if (chunk * kChunk + k < DEPTH) {
                    warpgroup_multiply<kPart, A_SIGNED>(sums.parts[part], advance(a, k), advance(b, k), chunk + k > 0);
                }
            }
            products_end_group();
            if (chunk + part > 0) {
                products_wait<1>();  // those of the buffer before are done
                reader.release(before);
                if (!RESIDENT && part == 0) {
                    reader.release_rows(rows_before);
                }
            }
            // Behind the release of what has been read: buffers are scarcer than time.
            if (part == kParts - 1) {
                meanwhile(chunk);
            }
            before = reader.cursor.at;
            reader.cursor.next();
        }
        rows_before = reader.row_cursor.at;
        reader.row_cursor.next();
    }
    products_wait<0>();
    settle(sums);
    reader.release(before);
    if (!RESIDENT) {
        reader.release_rows(rows_before);
    }
}

#endif

// What is behind the buffers in shared memory.
struct Behind {
    unsigned char *lines, *slots;
    float* constants;
    int* moved;
};

constexpr bool kHasLines = !COLUMN_STAGES && !((STAGED || DIRECT) && EPILOGUE == 0);

#if !STAGED
constexpr int kSlot = 0, kMovedRows = 0;
#endif
#if !DIRECT
constexpr int kConstants = 0;
#endif

// A warpgroup's products and what follows them.
__device__ __forceinline__ void consume(const GemmArgs& p, const Buffers& of, const Behind& behind, Range range,
                                        const Tiles& tiles, int team, int warp, int lane) {
    Reader reader = {of, operand(of.rows + warp / 4 * kTileBytes), operand(of.stages), team, lane, false};
    const int own = warp % (4 * kGroups / kTeams);  // which of the team's warps
    Sums sums;
    unsigned char* const lines = behind.lines + warp * kWM * kLine;
#if STAGED
    unsigned char* const slots = behind.slots + warp * kSlots * kSlot;
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
        reader.fresh = tile == range.first || walk.column0 == 0;
        reader.rows_phase ^= static_cast<int>(reader.fresh);
#if STAGED
        move_rows(p, place(tile + 1 - OVERLAP), lane);
#elif DIRECT
        Part part;
        if (EARLY) {
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
        if (RESIDENT && walk.last_of_rows()) {
            reader.release_rows(0);
        }
#if DIRECT
        if (!EARLY) {
            part.begin(p, walk.row0 + 16 * own, lane);
        }
#endif
#if STAGED && !OVERLAP
        finish(p, place(tile), place(tile + 1), lane, slots, sums.fragments);
#elif OVERLAP
#elif DIRECT
        finish(p, part, lane, lines, behind.constants, sums.fragments);
#elif COLUMN_STAGES
        barrier_wait(&of.barriers->columns_full[column_cursor.at], column_cursor.phase);
        finish_columns<true>(p, walk.row0 + 16 * own, walk.column0, lane, of.columns + column_cursor.at * kColumnBytes,
                             sums.fragments);
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(&of.barriers->columns_empty[column_cursor.at]);
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
    behind.constants = reinterpret_cast<float*>(behind.slots + (STAGED ? 4 * kGroups * kSlots * kSlot : 0));
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
    const Tiles tiles = {(p.m + kTileM - 1) / kTileM, DIRECT ? 1 : (p.n + kBN - 1) / kBN};
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
