// Codes behind an activation after a product of few rows, by the tables of `epilogue_activation.cuh`, which are on their way to
// shared memory beforehand. A warp takes 8 rows of 32 columns at a time, a lane 8 neighbours of a row.
#pragma once

#include "few_sums.cuh"

constexpr int kEightBytes = 64 + 16 * CELLS;  // of eight columns: factors and addends, then their table
constexpr int kBesideBytes = kBN / 8 * kEightBytes;
constexpr int kPieces = kBN / 32 * (kBM / 8);

struct Finish {
    const GemmArgs& p;
    const unsigned char* columns;
    int row0, column0;

    __device__ __forceinline__ Finish(const GemmArgs& p, unsigned char* columns, int row0, int column0)
        : p(p), columns(columns), row0(row0), column0(column0) {
        const unsigned char* const from = p.table + column0 / 8 * kEightBytes;
#pragma unroll 4
        for (int i = threadIdx.x; i < kBesideBytes / 16; i += kThreads) {
            copy_async(columns + 16 * i, from + 16 * i, true);
        }
        copies_end_group();
    }

    __device__ __forceinline__ void fetch() const {}

    __device__ __forceinline__ void run(const Sums& sums) const {
        const int thread = thread_again(), g = thread % 32 / 4, t = thread % 4;
        // A quad's lanes begin with different pairs of their eight columns: what they read lies in different banks. `turned`:
        // where the bytes of codes are before they are turned back by two a lane.
        const uint32_t turned = t == 0 ? 0x3210u : t == 1 ? 0x1076u : t == 2 ? 0x7654u : 0x5432u;
#pragma unroll 1
        for (int piece = thread / 32; piece < kPieces; piece += kWarps) {
            const int row = piece % (kBM / 8) * 8 + g, eight = piece / (kBM / 8) * 4 + t;
            const unsigned char* const numbers = columns + eight * kEightBytes;
            uint32_t pairs[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int pair = (j + t) % 4;
                int s[2];
                sums.read(row, 8 * eight + 2 * pair, s);
                const int4 number = *reinterpret_cast<const int4*>(numbers + 16 * pair);
                const unsigned char* const table = numbers + 64 + 4 * pair;
                pairs[j] = __byte_perm(place(s[0], number.x, number.y, table), place(s[1], number.z, number.w, table + 2), 0x62);
            }
            const uint32_t codes[2] = {of(pairs[0], pairs[1]), of(pairs[2], pairs[3])};
            const int r = row0 + row, c = column0 + 8 * eight;
            if (r < p.m && c < p.n) {
                *reinterpret_cast<uint2*>(static_cast<unsigned char*>(p.out) + code_at(r, c, p.ldo)) = {
                    __byte_perm(codes[0], codes[1], turned), __byte_perm(codes[0], codes[1], turned ^ 0x4444u)};
            }
        }
    }

    // 128 more or less than a sum's code, in the third byte.
    __device__ __forceinline__ static uint32_t place(int sum, int factor, int add, const unsigned char* table) {
        const uint32_t x = static_cast<uint32_t>(sum) * static_cast<uint32_t>(factor) + static_cast<uint32_t>(add);
        const uint32_t u = static_cast<uint32_t>(clamp_sum(static_cast<int>(x), 0, (CELLS << 16) - 1));
        return (static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(table + 16 * (u >> 16))) << 8) + u;
    }

    __device__ __forceinline__ static uint32_t of(uint32_t left, uint32_t right) {
        return __vabsdiffu4(__byte_perm(left, right, 0x5410), 0x80808080u);
    }
};
