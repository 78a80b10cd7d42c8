// Products of codes with few rows, as of one image: many small blocks, none of which waits twice for memory.
//
//     sums[M, N] = a[M, K] b[N, K]^T,   y = sums * scale[n] + bias[n]
//
// A block computes a tile of kBM x kBN sums. kSplit x kWarpsN warps share out k and the columns among themselves; each loads
// what it needs straight into registers, all at once, and b and constants, which no kernel writes, even before the kernel before
// has ended. The sums of all shares of k meet in shared memory. From there all threads take parts of the tile through the epilogue,
// a few sums each (SPREAD, `few_*.cuh`), or, where an epilogue has no such way, warps take fragments as in `gemm.cu`.
//
// The order of k does not matter as long as a and b have the same. So a lane takes 16 neighbouring bytes of a row, four lanes
// a unit of 64, and the words of these are operands of two products:
//
//     unit:     bytes 16t .. 16t + 3 | 16t + 4 ..  | 16t + 8 ..  | 16t + 12 ..      of lane t of a row's four
//     product:  first, low half      | high half   | second, low | high half
//
// NORM: a is no codes but floats, and every block makes the codes of their LayerNorm itself, in shared memory.
// EARLY: the next kernel's blocks may come, and load what no kernel writes, while this one's still wait for the kernel before.
//
// Compiled once a tile and epilogue; the constants in capitals come from `qvit/engines/cuda/products.py` and `few_tiles.py`.

constexpr int kMultiply = kSplit * kWarpsN;           // warps that do; others take part in what is before and behind
constexpr int kThreads = 32 * kWarps;
constexpr int kPN = kBN / kWarpsN;                    // columns that a warp multiplies
constexpr int kUnit = 64;                             // bytes of k; a warp has kUnits at a time, kRounds times (kEven: all are there)
constexpr int kEightsA = kBM / 8, kEightsB = kPN / 8; // eights of rows of a and of b
constexpr int kWM = 16, kWN = kPart;                  // a warp's part of the epilogue
constexpr int kRows = 1, kColumns = kWN / 8;          // in fragments
constexpr int kParts = kBM / kWM * (kBN / kWN);
static_assert(kMultiply <= kWarps, "every share has its warp");
static_assert(kBN % kWarpsN == 0 && kPN % 8 == 0 && kBM % 16 == 0 && kBN % kPart == 0, "tiles are cut evenly");

#include "epilogue.cuh"

// kBesideBytes: of shared memory beside sums and codes.
#if !SPREAD
constexpr int kSumBytes = 4 * kSplit * kBM * kBN;
constexpr int kBesideBytes = kWarps * kWM * kLine;
#elif EPILOGUE == 0
#include "few_floats.cuh"
#elif EPILOGUE == 1
#include "few_activation.cuh"
#else
#include "few_heads.cuh"
#endif

#if NORM
#include "few_norm.cuh"
#else
typedef GemmArgs FewArgs;
constexpr int kCodeBytes = kMultiply * kUnits * kBM * kUnit;
#endif
static_assert(kSumBytes + kBesideBytes + kCodeBytes == kShared, "the launch gives what is used");

static_assert(kTileRows % kBM == 0, "a block's rows are in one tile");

// Where a lane's 16 bytes of a unit are, of eights of rows from `row` on. The places of `layout.cuh`, in parts: eights of rows are
// 1024 bytes, and units of odd numbers are the others' places with one bit turned. kOneTile: all of them are in one tile.
template <int kEights, bool kOneTile>
struct Places {
    static constexpr int kStarts = kOneTile ? 1 : kEights;
    unsigned starts[kStarts], lane_place;

    __device__ __forceinline__ Places(int row, int lane, int chunks) {
        const int g = lane / 4, t = lane % 4;
        lane_place = g * kChunk + (t ^ g) * 16;
#pragma unroll
        for (int i = 0; i < kStarts; i++) {
            const int eight = row / 8 + i;
            starts[i] = eight / 8 * chunks * kTileBytes + eight % 8 * 1024;
        }
    }

    __device__ __forceinline__ const unsigned char* at(const void* codes, int unit, int i) const {
        const unsigned place = unit / 2 * kTileBytes + (lane_place ^ unit % 2 * kUnit);
        return static_cast<const unsigned char*>(codes) + (starts[kOneTile ? 0 : i] + place) + (kOneTile ? 1024 * i : 0);
    }
};

// A warp's columns of a share of k.
struct Columns {
    Places<kEightsB, false> places;
    uint4 of[kUnits][kEightsB];

    __device__ __forceinline__ void fetch(const void* codes, int first, int units) {
#pragma unroll
        for (int u = 0; u < kUnits; u++) {
#pragma unroll
            for (int i = 0; i < kEightsB; i++) {
                of[u][i] = {0u, 0u, 0u, 0u};
                if (kEven || first + u < units) {
                    of[u][i] = load_once(places.at(codes, first + u, i));
                }
            }
        }
    }
};

#if !NORM

// Rows of codes, on their way to shared memory, where registers are not held meanwhile: a lane reads what it has copied itself.
struct Rows {
    Places<kEightsA, true> places;
    unsigned char* own;  // the lane's
    const unsigned char* from[kUnits];

    __device__ __forceinline__ Rows(unsigned char* staged, int row0, int warp, int lane, int chunks)
        : places(row0, lane, chunks), own(staged + (warp * kUnits * kEightsA * 32 + lane) * 16) {}
    // Where a share is, of which `first` is the first unit.
    __device__ __forceinline__ void find(const void* codes, int first, int units) {
#pragma unroll
        for (int u = 0; u < kUnits; u++) {
            from[u] = places.at(codes, kEven || first + u < units ? first + u : 0, 0);
            hold(from[u]);
        }
    }
    __device__ __forceinline__ void fetch(int first, int units) const {
#pragma unroll
        for (int u = 0; u < kUnits; u++) {
#pragma unroll
            for (int i = 0; i < kEightsA; i++) {
                copy_async(own + 512 * (u * kEightsA + i), from[u] + 1024 * i, kEven || first + u < units);
            }
        }
        copies_end_group();
    }
    // Operands of both products of a unit.
    __device__ __forceinline__ void read(int, int u, int, int i, uint32_t (&one)[4], uint32_t (&two)[4]) const {
        const uint4 up = *reinterpret_cast<const uint4*>(own + 512 * (u * kEightsA + 2 * i));
        const uint4 down = *reinterpret_cast<const uint4*>(own + 512 * (u * kEightsA + 2 * i + 1));
        one[0] = up.x, one[1] = down.x, one[2] = up.y, one[3] = down.y;
        two[0] = up.z, two[1] = down.z, two[2] = up.w, two[3] = down.w;
    }
};

#endif

// `first`: the share's first of all `units`.
__device__ __forceinline__ void accumulate(const Rows& rows, const Columns& columns, int first, int units,
                                           int (&sums)[kEightsA / 2][kEightsB][4]) {
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
#pragma unroll
        for (int i = 0; i < kEightsA / 2; i++) {
            uint32_t one[4], two[4];
            rows.read(first, u, units, i, one, two);
#pragma unroll
            for (int j = 0; j < kEightsB; j++) {
                const uint4& b = columns.of[u][j];
                const uint32_t b_one[2] = {b.x, b.y}, b_two[2] = {b.z, b.w};
                multiply<A_SIGNED>(sums[i][j], one, b_one);
                multiply<A_SIGNED>(sums[i][j], two, b_two);
            }
        }
    }
}

#if !SPREAD

// What the epilogue is going to read of columns comes into the first-level cache while operands are under way.
struct Toucher {
    unsigned char* places;  // where lines of codes will be
    int column0;

    // Each of kCount things by a thread.
    template <int kCount, class Do>
    __device__ __forceinline__ static void share_out(const Do& each) {
        static_assert(4 * kCount <= kBesideBytes, "every touch has a place");
#pragma unroll
        for (int first = 0; first < kCount; first += kThreads) {
            const int i = first + threadIdx.x;
            if (i < kCount) {
                each(i);
            }
        }
    }

    template <int kArrays>
    __device__ __forceinline__ void columns(const float* const (&arrays)[kArrays]) const {
        constexpr int kEach = kTouched / 4, kCount = kBN / kEach;
        static_assert(4 * kArrays * kCount <= kBesideBytes, "every touch has a place");
#pragma unroll
        for (int array = 0; array < kArrays; array++) {
            share_out<kCount>([&](int i) { touch(places + 4 * (array * kCount + i), arrays[array] + column0 + kEach * i); });
        }
    }

    __device__ __forceinline__ void constants(const GemmArgs& p) const {
#if EPILOGUE == 0
        columns({p.scale, p.bias});
#elif EPILOGUE == 2
        columns({p.scale, p.bias, p.inverse, p.shift, p.offset, p.step});
#elif CELLS
        constexpr int kEach = kNumberBytes / kTouched;
        share_out<kBN / kWN * kEach>([&](int i) {  // the tables are more than that cache is worth
            touch(places + 4 * i, p.table + (column0 / kWN + i / kEach) * kColumnBytes + i % kEach * kTouched);
        });
#else
        columns({p.scale, p.bias, p.inverse, p.offset});
#endif
    }
};

#endif

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kBound) kernel(const QVIT_CONSTANT FewArgs p) {
#if EARLY
    announce();
#endif
    QVIT_SHARED(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int chunks = (K + kChunk - 1) / kChunk, units = (K + kUnit - 1) / kUnit;
    const int row0 = static_cast<int>(blockIdx.x) / TILES_N * kBM, column0 = static_cast<int>(blockIdx.x) % TILES_N * kBN;
    const int share = warp / kWarpsN, part0 = warp % kWarpsN * kPN;
    unsigned char* const beside = memory + kSumBytes;

    const bool multiplies = kMultiply == kWarps || warp < kMultiply;
    const int first = share * kUnits;
    Columns columns = {{column0 + part0, lane, chunks}, {}};
    if (multiplies) {
        columns.fetch(p.b, first, units);
    }
#if SPREAD
    const Sums meeting = {reinterpret_cast<int*>(memory)};
    const Finish finish(p, beside, row0, column0);
#else
    uint4* const meeting = reinterpret_cast<uint4*>(memory);  // [kSplit][kBM / 16][kBN / 8][32], a fragment's sums of each lane
    unsigned char* const lines = beside;
#endif
    unsigned char* const codes = beside + kBesideBytes;
#if NORM
    Normer normer(p, codes, row0, warp, lane);
    const Rows rows = {codes};
    float x[kMine][kLanes];
#else
    Rows rows(codes, row0, warp, lane, chunks);
    rows.find(p.a, first, units);
#endif
    await_former_kernel();
#if SPREAD
    finish.fetch();
#endif
#if NORM
    normer.fetch(x);
#else
    if (multiplies) {
        rows.fetch(first, units);
    }
#endif
    __syncwarp();  // the compiler is to load here, not where products begin
#if !SPREAD
    const Toucher toucher = {lines, column0};
    toucher.constants(p);
    copies_end_group();
#endif
#if NORM
    normer.write(x);
    __syncthreads();  // every warp reads codes of all rows
#else
    copies_wait<0>();  // only what the lane itself has copied is read before the next barrier
#endif
    if (multiplies) {
        const int thread = thread_again();
        int sums[kEightsA / 2][kEightsB][4] = {};
        accumulate(rows, columns, first, units, sums);
#pragma unroll 1
        for (int round = 1; round < kRounds; round++) {
            const int next = (kSplit * round + share) * kUnits;
            columns.fetch(p.b, next, units);
#if !NORM
            rows.find(p.a, next, units);
            rows.fetch(next, units);
            copies_wait<0>();
#endif
            accumulate(rows, columns, next, units, sums);
        }
#pragma unroll
        for (int i = 0; i < kEightsA / 2; i++) {
#pragma unroll
            for (int j = 0; j < kEightsB; j++) {
                const int (&s)[4] = sums[i][j];
#if SPREAD
                const int row = 16 * i + thread % 32 / 4, column = thread / 32 % kWarpsN * kPN + 8 * j + 2 * (thread % 4);
                meeting.write(thread / 32 / kWarpsN, row, column, s[0], s[1]);
                meeting.write(thread / 32 / kWarpsN, row + 8, column, s[2], s[3]);
#else
                meeting[((share * (kBM / 16) + i) * (kBN / 8) + part0 / 8 + j) * 32 + lane] = {
                    static_cast<uint32_t>(s[0]), static_cast<uint32_t>(s[1]), static_cast<uint32_t>(s[2]),
                    static_cast<uint32_t>(s[3])};
#endif
            }
        }
    }
    copies_wait<0>();  // what was copied for the epilogue is there; where it was only touched, `lines` are used below
    __syncthreads();   // sums of all shares, and other threads' copies
#if SPREAD
    finish.run(meeting);
#else
#pragma unroll 1
    for (int part = warp; part < kParts; part += kWarps) {
        const int i = part / (kBN / kWN), j0 = part % (kBN / kWN) * kColumns;
        int sums[kRows][kColumns][4] = {};
#pragma unroll
        for (int s = 0; s < kSplit; s++) {
#pragma unroll
            for (int j = 0; j < kColumns; j++) {
                const uint4 one = meeting[((s * (kBM / 16) + i) * (kBN / 8) + j0 + j) * 32 + lane];
                sums[0][j][0] += static_cast<int>(one.x), sums[0][j][1] += static_cast<int>(one.y);
                sums[0][j][2] += static_cast<int>(one.z), sums[0][j][3] += static_cast<int>(one.w);
            }
        }
        finish(p, row0 + kWM * i, column0 + 8 * j0, lane, lines + warp * kWM * kLine, sums);
        __syncwarp();  // codes have left their lines
    }
#endif
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const FewArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
