// Products of codes with few rows, as of one image: many small blocks, none of which waits twice for memory.
//
//     sums[M, N] = a[M, K] b[N, K]^T,   y = sums * scale[n] + bias[n]
//
// A block computes a tile of kBM x kBN sums. Its kSplit x kWarpsN warps share out k and the columns among themselves; each loads
// what it needs straight into registers, all at once, and b, which no kernel writes, even before the kernel before has ended.
// The sums of all shares of k meet in shared memory, and each warp takes parts of the tile through the epilogue.
//
// The order of k does not matter as long as a and b have the same. So a lane takes 16 neighbouring bytes of a row, four lanes
// a unit of 64, and the words of these are operands of two products:
//
//     unit:     bytes 16t .. 16t + 3 | 16t + 4 ..  | 16t + 8 ..  | 16t + 12 ..      of lane t of a row's four
//     product:  first, low half      | high half   | second, low | high half
//
// NORM: a is no codes but floats, and every block makes the codes of their LayerNorm itself, in shared memory.
//
// Compiled once a tile and epilogue; the constants in capitals come from `qvit/engines/cuda/plan.py` and `few_tiles.py`.

constexpr int kWarps = kSplit * kWarpsN;
constexpr int kThreads = 32 * kWarps;
constexpr int kPN = kBN / kWarpsN;                    // columns that a warp multiplies
constexpr int kUnit = 64;                             // bytes of k; a warp has kUnits at a time, kRounds times (kEven: all are there)
constexpr int kEightsA = kBM / 8, kEightsB = kPN / 8; // eights of rows of a and of b
constexpr int kWM = 16, kWN = kPart;                  // a warp's part of the epilogue
constexpr int kRows = 1, kColumns = kWN / 8;          // in fragments
constexpr int kParts = kBM / kWM * (kBN / kWN);
static_assert(kBN % kWarpsN == 0 && kPN % 8 == 0 && kBM % 16 == 0 && kBN % kPart == 0, "tiles are cut evenly");

#include "epilogue.cuh"

#if NORM
constexpr int kVector = CHANNELS % 128 == 0 ? 4 : CHANNELS % 64 == 0 ? 2 : 1;
#include "norm_row.cuh"

constexpr int kCodeLine = (CHANNELS + 127) / 128 * 128 + 64;  // two rows' units are in different banks
constexpr int kMine = (kBM + kWarps - 1) / kWarps;  // rows of a warp
static_assert(kLanes <= 32, "doubts are bits of a word");

struct FewArgs : GemmArgs {
    NormArgs norm;
};
#else
typedef GemmArgs FewArgs;
#endif

constexpr int kSumBytes = 4 * kSplit * kBM * kBN;

struct Share {
    uint4 a[kUnits][kEightsA], b[kUnits][kEightsB];
};

// Where a lane's 16 bytes of a unit are: `first` of its warp's units, of all `units`, of eights of rows from `row` on. The places
// of `layout.cuh`, in parts: eights of rows are 1024 bytes, and units of odd numbers are the others' places with one bit turned.
template <int kEights>
struct Places {
    unsigned rows[kEights], lane_place;

    __device__ __forceinline__ Places(int row, int lane, int chunks) {
        const int g = lane / 4, t = lane % 4;
        lane_place = g * kChunk + (t ^ g) * 16;
#pragma unroll
        for (int i = 0; i < kEights; i++) {
            const int eight = row / 8 + i;
            rows[i] = eight / 8 * chunks * kTileBytes + eight % 8 * 1024;
        }
    }

    __device__ __forceinline__ void fetch(const void* codes, int first, int units, uint4 (&to)[kUnits][kEights]) const {
#pragma unroll
        for (int u = 0; u < kUnits; u++) {
            const int unit = first + u;
            const unsigned at = unit / 2 * kTileBytes + (lane_place ^ unit % 2 * kUnit);
#pragma unroll
            for (int i = 0; i < kEights; i++) {
                to[u][i] = {0u, 0u, 0u, 0u};
                if (kEven || unit < units) {
                    to[u][i] = *reinterpret_cast<const uint4*>(static_cast<const unsigned char*>(codes) + (rows[i] + at));
                }
            }
        }
    }
};

__device__ __forceinline__ void accumulate(const Share& of, int (&sums)[kEightsA / 2][kEightsB][4]) {
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
#pragma unroll
        for (int i = 0; i < kEightsA / 2; i++) {
            const uint4 &up = of.a[u][2 * i], &down = of.a[u][2 * i + 1];
            const uint32_t first[4] = {up.x, down.x, up.y, down.y}, second[4] = {up.z, down.z, up.w, down.w};
#pragma unroll
            for (int j = 0; j < kEightsB; j++) {
                const uint32_t b_first[2] = {of.b[u][j].x, of.b[u][j].y}, b_second[2] = {of.b[u][j].z, of.b[u][j].w};
                multiply<A_SIGNED>(sums[i][j], first, b_first);
                multiply<A_SIGNED>(sums[i][j], second, b_second);
            }
        }
    }
}

// What the epilogue is going to read comes into the first-level cache while operands are under way; `place`: 16 bytes to no use, of 16 such.
struct Toucher {
    unsigned char* place;

    // Each of kCount things by a thread.
    template <int kCount, class Do>
    __device__ __forceinline__ static void share_out(const Do& each) {
#pragma unroll
        for (int first = 0; first < kCount; first += kThreads) {
            const int i = first + threadIdx.x;
            if (i < kCount) {
                each(i);
            }
        }
    }

    template <class T>
    __device__ __forceinline__ void columns(const T* from, int column0) const {
        constexpr int kEach = 16 / sizeof(T);
        share_out<kBN / kEach>([&](int i) { touch(place, from + column0 + kEach * i); });
    }

    __device__ __forceinline__ void constants(const GemmArgs& p, int column0) const {
#if EPILOGUE == 1 && CELLS
        share_out<kBN / kWN * (kNumberBytes / 16)>([&](int i) {  // the tables are more than that cache is worth
            const int part = column0 / kWN + i / (kNumberBytes / 16);
            touch(place, p.table + part * kColumnBytes + i % (kNumberBytes / 16) * 16);
        });
#else
        columns(p.scale, column0);
        columns(p.bias, column0);
#endif
#if EPILOGUE == 1 && !CELLS
        columns(p.inverse, column0);
        columns(p.offset, column0);
#elif EPILOGUE == 2
        columns(p.inverse, column0);
        columns(p.shift, column0);
        columns(p.offset, column0);
        columns(p.step, column0);
#endif
    }

#if EPILOGUE == 0 && (RESIDUAL || POSITION)
    __device__ __forceinline__ void rows(const GemmArgs& p, int row0, int column0) const {
        if (p.ldo % 4 || p.n % 4) {
            return;  // rows begin anywhere
        }
        share_out<kBM * (kBN / 4)>([&](int i) {
            const int r = row0 + i / (kBN / 4), c = column0 + i % (kBN / 4) * 4;
            if (r < p.m && c < p.n) {
                const int to = POSITION ? r / p.rows_in * p.rows_out + p.row_first + r % p.rows_in : float_row(p, r);
                if constexpr (RESIDUAL) {
                    touch(place, p.residual + static_cast<size_t>(to) * p.ldo + c);
                }
                if constexpr (POSITION) {
                    touch(place, p.position + static_cast<size_t>(to % p.rows_out) * p.n + c);
                }
            }
        });
    }
#endif
};

#if NORM

// The codes in doubt of a row that has just been read, as they are defined; `doubts`: a bit for each of the lane's values.
__device__ __noinline__ inline void codes_again(const NormArgs& p, const float* row, int lane, uint32_t doubts,
                                                unsigned char* codes) {
    float x[kLanes];
    load_row([&](int c) { return row + c; }, lane, x);
    const Moments of = exact_moments(x, lane, p.eps);
#pragma unroll 1
    for (int i = 0; i < kLanes; i++) {
        if (doubts >> i & 1) {
            const int c = channel(i, lane);
            codes[c] = static_cast<unsigned char>(exact_code(exact_value(p, of, row[c], c), p.offset[c], p.step[c], p.low, p.high));
        }
    }
}

// A block's rows of codes; each warp's rows are under way together.
struct Normer {
    const FewArgs& p;
    unsigned char* codes;
    int row0, warp, lane;
    float gain[kLanes], shift[kLanes];

    __device__ __forceinline__ Normer(const FewArgs& p, unsigned char* codes, int row0, int warp, int lane)
        : p(p), codes(codes), row0(row0), warp(warp), lane(lane) {
        load_row([&](int c) { return p.norm.gain + c; }, lane, gain);
        load_row([&](int c) { return p.norm.shift + c; }, lane, shift);
    }

    __device__ __forceinline__ const float* row(int i) const {
        const int r = row0 + warp + kWarps * i;
        return p.norm.x + (r < p.m ? r : p.m - 1) * p.norm.ldx;
    }

    __device__ __forceinline__ void fetch(float (&x)[kMine][kLanes]) const {
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            const float* from = row(i);
            load_row([&](int c) { return from + c; }, lane, x[i]);
        }
    }

    __device__ __forceinline__ void write(const float (&x)[kMine][kLanes]) const {
        int code[kMine][kLanes];
        uint32_t doubts[kMine] = {};
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            row_codes(
                p.norm, x[i], [&](int k) { return gain[k]; }, [&](int k) { return shift[k]; }, lane, code[i],
                [&](int k) { doubts[i] |= 1u << k; });
        }
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            if (warp + kWarps * i < kBM) {
                unsigned char* line = codes + (warp + kWarps * i) * kCodeLine;
                store_row([&](int c) { return line + c; }, lane, code[i]);
                if (__any_sync(kAll, doubts[i] != 0)) {
                    __syncwarp();
                    codes_again(p.norm, row(i), lane, doubts[i], line);
                }
            }
        }
    }
};

// A lane's pieces of codes in shared memory; as `Places::fetch`.
__device__ __forceinline__ void read(const unsigned char* codes, int first, int units, int lane, uint4 (&to)[kUnits][kEightsA]) {
#pragma unroll
    for (int u = 0; u < kUnits; u++) {
#pragma unroll
        for (int i = 0; i < kEightsA; i++) {
            to[u][i] = {0u, 0u, 0u, 0u};
            if (kEven || first + u < units) {
                const int at = (8 * i + lane / 4) * kCodeLine + kUnit * (first + u) + lane % 4 * 16;
                to[u][i] = *reinterpret_cast<const uint4*>(codes + at);
            }
        }
    }
}

#endif

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads) kernel(const QVIT_CONSTANT FewArgs p) {
    QVIT_SHARED(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tiles_n = (p.n + kBN - 1) / kBN, chunks = (p.k + kChunk - 1) / kChunk, units = (p.k + kUnit - 1) / kUnit;
    const int row0 = blockIdx.x / tiles_n * kBM, column0 = blockIdx.x % tiles_n * kBN;
    const int share = warp / kWarpsN, part0 = warp % kWarpsN * kPN;
    uint4* const meeting = reinterpret_cast<uint4*>(memory);  // [kSplit][kBM / 16][kBN / 8][32], a fragment's sums of each lane
    unsigned char* const lines = memory + kSumBytes;

    const Places<kEightsB> columns(column0 + part0, lane, chunks);
    Share of;
    columns.fetch(p.b, share * kUnits, units, of.b);
#if NORM
    unsigned char* const codes = lines + kWarps * kWM * kLine;
    const Normer normer(p, codes, row0, warp, lane);
    const auto fetch_rows = [&](int unit) { read(codes, unit, units, lane, of.a); };
    float x[kMine][kLanes];
    await_former_kernel();
    normer.fetch(x);
#else
    const Places<kEightsA> rows(row0, lane, chunks);
    const auto fetch_rows = [&](int unit) { rows.fetch(p.a, unit, units, of.a); };
    await_former_kernel();
    fetch_rows(share * kUnits);
#endif
    __syncwarp();  // the compiler is to load here, not where products begin
#if TOUCH
    const Toucher toucher = {lines + 16 * (lane % 16)};
    toucher.constants(p, column0);
#if EPILOGUE == 0 && (RESIDUAL || POSITION)
    toucher.rows(p, row0, column0);
#endif
    copies_end_group();
#endif
#if NORM
    normer.write(x);
    __syncthreads();
    fetch_rows(share * kUnits);
#endif
    {
        int sums[kEightsA / 2][kEightsB][4] = {};
        accumulate(of, sums);
#pragma unroll 1
        for (int round = 1; round < kRounds; round++) {
            const int unit = (kSplit * round + share) * kUnits;
            columns.fetch(p.b, unit, units, of.b);
            fetch_rows(unit);
            accumulate(of, sums);
        }
#pragma unroll
        for (int i = 0; i < kEightsA / 2; i++) {
#pragma unroll
            for (int j = 0; j < kEightsB; j++) {
                const int (&s)[4] = sums[i][j];
                meeting[((share * (kBM / 16) + i) * (kBN / 8) + part0 / 8 + j) * 32 + lane] = {
                    static_cast<uint32_t>(s[0]), static_cast<uint32_t>(s[1]), static_cast<uint32_t>(s[2]),
                    static_cast<uint32_t>(s[3])};
            }
        }
    }
#if TOUCH
    copies_wait<0>();  // lines are used below
#endif
    __syncthreads();
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
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const FewArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
