// Products of codes on Hopper: wgmma from shared memory, tiles copied whole, and a warpgroup that does nothing but copy.
//
// A block takes kGroups x 64 rows of a; each of its warpgroups computes 64 of them against kBN columns at a time. Blocks run as
// many as there are multiprocessors; each has a range of tiles, row block by row block, so that a's rows stay in shared memory
// (RESIDENT) while b's tiles stream past in kStages buffers. Warpgroups meet at barriers of buffers only: while one is busy with
// its epilogue, others multiply.
//
// Compiled once a shape and epilogue; the constants in capitals come from `qvit/engines/cuda/plan.py`.
constexpr int kBM = 64 * kGroups;
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kRows = 1, kColumns = kBN / 8;  // a warp's part, in fragments
constexpr int kWM = 16, kWN = kBN;
constexpr int kPart = kBN > 256 ? 192 : kBN, kParts = kBN / kPart;  // columns of one instruction
// The copying warpgroup gives registers back, the others take them.
constexpr int kRegisters = kGroups == 2 ? 232 : kGroups == 3 ? 152 : 112;
constexpr bool kTradesRegisters = kGroups > 1;

#include "epilogue.cuh"
#include "hopper.cuh"

constexpr int kChunks = (DEPTH + kChunk - 1) / kChunk;   // of k
constexpr int kBytesA = kBM * kChunk, kBytesB = kBN * kChunk;  // of a chunk
// One-bit products go over all of k four times, so a stage is all of it.
constexpr int kPerStage = BITS ? kChunks : 1;
constexpr int kStage = kPerStage * kBytesB + (RESIDENT ? 0 : kBytesA);
static_assert(RESIDENT || !BITS, "rows of one-bit products stay");
constexpr int kHeld = RESIDENT ? kChunks * kBytesA : 0;

struct Barriers {
    Barrier full[kStages], empty[kStages];
    Barrier rows_full[RESIDENT ? kChunks : 1], rows_empty;
};

struct Buffers {
    unsigned char *held, *stages, *lines;
    Barriers* barriers;
};

// Counts through buffers; the phase turns with every round.
struct Cursor {
    int at = 0, phase = 0;
    __device__ __forceinline__ void next() {
        if (++at == kStages) {
            at = 0;
            phase ^= 1;
        }
    }
};

// This block's tiles, numbered row block by row block.
struct Range {
    int first, last;
};

__device__ __forceinline__ Range range_of(int tiles) {
    const long long blocks = gridDim.x;
    return {static_cast<int>(tiles * static_cast<long long>(blockIdx.x) / blocks),
            static_cast<int>(tiles * (static_cast<long long>(blockIdx.x) + 1) / blocks)};
}

// Chunk `chunk` of `rows` rows from `row0` on, tile by tile.
__device__ __forceinline__ void copy_rows(unsigned char* to, const void* from, int row0, int rows, int chunk, Barrier* barrier) {
    for (int r = 0; r < rows; r += kTileRows) {
        copy_tile(to + r * kChunk, static_cast<const unsigned char*>(from) + code_at(row0 + r, chunk * kChunk, kChunks), kTileBytes,
                  barrier);
    }
}

// The copying warpgroup's one lane.
__device__ __forceinline__ void produce(const GemmArgs& p, const Buffers& of, Range range, int tiles_n) {
    Cursor cursor;
    int rows_phase = 0;
    for (int tile = range.first; tile < range.last; tile++) {
        const int row0 = tile / tiles_n * kBM, column0 = tile % tiles_n * kBN;
        const bool fresh = tile == range.first || tile % tiles_n == 0;
        for (int chunk = 0; chunk < kChunks; chunk++) {
            if (RESIDENT && fresh) {
                if (chunk == 0 && tile != range.first) {
                    barrier_wait(&of.barriers->rows_empty, rows_phase);
                    rows_phase ^= 1;
                }
                Barrier* full = &of.barriers->rows_full[chunk];
                barrier_expect(full, kBytesA);
                copy_rows(of.held + chunk * kBytesA, p.a, row0, kBM, chunk, full);
            }
            Barrier* full = &of.barriers->full[cursor.at];
            unsigned char* stage = of.stages + cursor.at * kStage;
            if (chunk % kPerStage == 0) {
                // The first round finds its buffers empty: it waits for the phase before the first.
                barrier_wait(&of.barriers->empty[cursor.at], cursor.phase ^ 1);
                barrier_expect(full, kStage);
            }
            copy_rows(stage + chunk % kPerStage * kBytesB, p.b, column0, kBN, chunk, full);
            if (!RESIDENT) {
                copy_rows(stage + kBytesB, p.a, row0, kBM, chunk, full);
            }
            if ((chunk + 1) % kPerStage == 0) {
                cursor.next();
            }
        }
    }
}

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

// Where a warpgroup is in its work: the buffer it reads, and what it has to say when it has been read.
struct Reader {
    const Buffers& of;
    int group, lane;
    bool fresh;  // these rows are read for the first time
    int rows_phase = 1;
    Cursor cursor;

    __device__ __forceinline__ void await_rows(int chunk) const {
        if (RESIDENT && fresh) {
            barrier_wait(&of.barriers->rows_full[chunk], rows_phase);
        }
    }
    __device__ __forceinline__ const unsigned char* await_stage() const {
        barrier_wait(&of.barriers->full[cursor.at], cursor.phase);
        return of.stages + cursor.at * kStage;
    }
    __device__ __forceinline__ void release(int stage) const {
        if (lane == 0) {
            barrier_arrive(&of.barriers->empty[stage]);
        }
    }
};

#if BITS

// One plane of a against one of b, over all of k.
__device__ __forceinline__ void multiply_planes(Sums& sums, const unsigned char* rows, const unsigned char* stage, int plane_a,
                                                int plane_b, bool add) {
    settle(sums);
    products_begin();
#pragma unroll
    for (int k = 0; k < DEPTH; k += 64) {
        const int chunk = k / kChunk, from = k % kChunk;
        const Operand a = operand(rows + chunk * kBytesA), b = operand(stage + chunk * kBytesB);
#pragma unroll
        for (int part = 0; part < kParts; part++) {
            warpgroup_multiply_bits<kPart>(sums.parts[part], advance(a, from + 32 * (1 - plane_a)),
                                           advance(b, part * kPart * kChunk + from + 32 * (1 - plane_b)), add || k > 0);
        }
    }
    products_end_group();
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

// a = 2 a1 + a0 and b = -2 b1 + b0, so a b = 2 (-(2 a1 b1 + a0 b1) + a1 b0) + a0 b0.
__device__ __forceinline__ void multiply_all(Reader& reader, Sums& sums) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
        reader.await_rows(chunk);
    }
    const unsigned char* stage = reader.await_stage();
    const unsigned char* rows = reader.of.held + reader.group * kTileBytes;
    multiply_planes(sums, rows, stage, 1, 1, false);
    change(sums, [](int x) { return 2 * x; });
    multiply_planes(sums, rows, stage, 0, 1, true);
    change(sums, [](int x) { return -x; });
    multiply_planes(sums, rows, stage, 1, 0, true);
    change(sums, [](int x) { return 2 * x; });
    multiply_planes(sums, rows, stage, 0, 0, true);
    reader.release(reader.cursor.at);
    reader.cursor.next();
}

#else

__device__ __forceinline__ void multiply_all(Reader& reader, Sums& sums) {
    int before = -1;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
        reader.await_rows(chunk);
        const unsigned char* stage = reader.await_stage();
        const unsigned char* rows = RESIDENT ? reader.of.held + chunk * kBytesA : stage + kBytesB;
        const Operand a = operand(rows + reader.group * kTileBytes), b = operand(stage);
        settle(sums);
        products_begin();
#pragma unroll
        for (int k = 0; k < kChunk; k += 32) {
            if (chunk * kChunk + k < DEPTH) {
#pragma unroll
                for (int part = 0; part < kParts; part++) {
                    warpgroup_multiply<kPart, A_SIGNED>(sums.parts[part], advance(a, k), advance(b, part * kPart * kChunk + k),
                                                        chunk + k > 0);
                }
            }
        }
        products_end_group();
        if (before >= 0) {
            products_wait<1>();  // those of the buffer before are done
            reader.release(before);
        }
        before = reader.cursor.at;
        reader.cursor.next();
    }
    products_wait<0>();
    settle(sums);
    reader.release(before);
}

#endif

// A warpgroup's products and what follows them.
__device__ __forceinline__ void consume(const GemmArgs& p, const Buffers& of, Range range, int tiles_n, int group, int warp,
                                        int lane) {
    Reader reader = {of, group, lane, false};
    Sums sums;
    for (int tile = range.first; tile < range.last; tile++) {
        const int row0 = tile / tiles_n * kBM + 64 * group, column0 = tile % tiles_n * kBN;
        reader.fresh = tile == range.first || tile % tiles_n == 0;
        reader.rows_phase ^= static_cast<int>(reader.fresh);
        multiply_all(reader, sums);
        if (RESIDENT && tile % tiles_n == tiles_n - 1 && lane == 0) {
            barrier_arrive(&of.barriers->rows_empty);
        }
        finish(p, row0 + 16 * (warp % 4), column0, lane, of.lines + warp * kWM * kLine, sums.fragments);
        __syncwarp();
    }
}

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads, 1) kernel(const GemmArgs p) {
    await_former_kernel();
    QVIT_SHARED(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Buffers of;
    of.held = memory;
    of.stages = memory + kHeld;
    of.lines = of.stages + kStages * kStage;
    of.barriers = reinterpret_cast<Barriers*>(of.lines + 4 * kGroups * kWM * kLine);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; i++) {
            barrier_init(&of.barriers->full[i], 1);
            barrier_init(&of.barriers->empty[i], 4 * kGroups);
        }
        for (int i = 0; i < (RESIDENT ? kChunks : 1); i++) {
            barrier_init(&of.barriers->rows_full[i], 1);
        }
        barrier_init(&of.barriers->rows_empty, 4 * kGroups);
        barriers_ready();
    }
    __syncthreads();
    const int tiles_n = (p.n + kBN - 1) / kBN;
    const Range range = range_of((p.m + kBM - 1) / kBM * tiles_n);
    if (warp >= 4 * kGroups) {
        if (kTradesRegisters) {
            registers_down<40>();
        }
        if (warp == 4 * kGroups && lane == 0) {
            produce(p, of, range, tiles_n);
        }
    } else {
        if (kTradesRegisters) {
            registers_up<kRegisters>();
        }
        consume(p, of, range, tiles_n, warp / 4, warp, lane);
    }
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const GemmArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
