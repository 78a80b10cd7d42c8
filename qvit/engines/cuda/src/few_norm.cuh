// LayerNorm of a block's rows in front of a product of few rows: codes in shared memory, a warp a row (NORM).
#pragma once

constexpr int kVector = CHANNELS % 128 == 0 ? 4 : CHANNELS % 64 == 0 ? 2 : 1;
#include "norm_places.cuh"

// Rows r and r + 8 lie together, their words taking turns: 16 bytes are a lane's operand of a product. 16 more set the next two
// rows apart, so that both are in different banks.
constexpr int kCodeLine = 2 * ((CHANNELS + kUnit - 1) / kUnit * kUnit) + 16;
constexpr int kTouches = (4 * CHANNELS + kTouched - 1) / kTouched;  // of an array of constants, of which there are six
constexpr int kCodeBytes = kBM / 2 * kCodeLine + 4 * 6 * kTouches;  // places of touches are behind the codes
constexpr int kMine = (kBM + kWarps - 1) / kWarps;            // rows of a warp
constexpr bool kHolds = 4 * kUnits * kEightsB + 3 * kLanes <= 64;  // registers hold gain and shift beside b and a row
static_assert(kLanes <= 32, "doubts are bits of a word");

// Where rows of codes begin, and where in its row a channel is.
__device__ __forceinline__ int line_at(int row) { return (row / 16 * 8 + row % 8) * kCodeLine + row / 8 % 2 * 4; }
__device__ __forceinline__ int code_in_line(int c) { return c / 4 * 8 + c % 4; }

struct FewArgs : GemmArgs {
    NormArgs norm;
};

// The codes in doubt of a row, as they are defined; `near`: its mean or nearly so, `doubts`: a bit for each of the lane's values.
__device__ __noinline__ inline void codes_again(const NormArgs& p, const Source* row, int lane, float near, uint32_t doubts,
                                                unsigned char* codes) {
    float x[kLanes];
    load_row([&](int c) { return row + c; }, lane, x);
    const Moments of = moments_near<CHANNELS>(x, near, p.eps, [&](int i) { return channel(i, lane) < CHANNELS; });
#pragma unroll 1
    while (doubts != 0) {
        const int c = channel(__ffs(static_cast<int>(doubts)) - 1, lane);
        doubts &= doubts - 1;
        codes[code_in_line(c)] = static_cast<unsigned char>(exact_code_at(p, of, value_of(row[c]), c));
    }
}

// A block's rows of codes; each warp's rows are under way together. Constants are brought near before there are rows, gain into
// registers where there is room.
struct Normer {
    const FewArgs& p;
    unsigned char* codes;
    int row0, warp, lane;
    float gain[kLanes], shift[kLanes];
    long long from[kMine];  // where rows begin

    __device__ __forceinline__ Normer(const FewArgs& p, unsigned char* codes, int row0, int warp, int lane)
        : p(p), codes(codes), row0(row0), warp(warp), lane(lane) {
        if constexpr (kHolds) {
            load_row([&](int c) { return p.norm.gain + c; }, lane, gain);
        }
#pragma unroll 1
        for (int i = threadIdx.x; i < kTouches; i += kThreads) {
            unsigned char* const place = codes + kBM / 2 * kCodeLine + 4 * i;
            const int c = kTouched / 4 * i;
            touch(place, p.norm.gain + c);
            touch(place + 4 * kTouches, p.norm.shift + c);
            touch(place + 8 * kTouches, p.norm.weight + c);
            touch(place + 12 * kTouches, p.norm.bias + c);
            touch(place + 16 * kTouches, p.norm.offset + c);
            touch(place + 20 * kTouches, p.norm.step + c);
        }
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            const int r = row0 + warp + kWarps * i;
            from[i] = (r < p.m ? r : p.m - 1) * p.norm.ldx;
            if constexpr (kHolds) {
                hold(from[i]);
            }
        }
    }

    __device__ __forceinline__ void fetch(float (&x)[kMine][kLanes]) {
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            load_row([&](int c) { return p.norm.x + from[i] + c; }, lane, x[i]);
        }
        if constexpr (kHolds) {
            load_row([&](int c) { return p.norm.shift + c; }, lane, shift);
        }
    }

    __device__ __forceinline__ void write(const float (&x)[kMine][kLanes]) const {
#pragma unroll
        for (int i = 0; i < kMine; i++) {
            if (kBM % kWarps == 0 || warp + kWarps * i < kBM) {  // the same for all lanes
                write(x[i], p.norm.x + from[i], codes + line_at(warp + kWarps * i));
            }
        }
    }

    __device__ __forceinline__ void write(const float (&x)[kLanes], const Source* from, unsigned char* line) const {
        float gains[kLanes], shifts[kLanes];
        if constexpr (!kHolds) {
            load_row([&](int c) { return p.norm.gain + c; }, lane, gains);
            load_row([&](int c) { return p.norm.shift + c; }, lane, shifts);
        }
        const RowPlaces of = places_of(
            p.norm, x, [&](int i) { return kHolds ? gain[i] : gains[i]; }, [&](int i) { return kHolds ? shift[i] : shifts[i]; }, lane);
        store_codes(of.u, line);
        if (__any_sync(kAll, of.close)) {
            uint32_t doubts = 0;
#pragma unroll
            for (int i = 0; i < kLanes; i++) {
                const bool there = CHANNELS % 32 == 0 || channel(i, lane) < CHANNELS;
                doubts |= static_cast<uint32_t>(there && of.doubts(i)) << i;
            }
            codes_again(p.norm, from, lane, of.mean, doubts, line);  // a lane's codes are its own to write
        }
    }

    __device__ __forceinline__ void store_codes(const uint32_t (&u)[kLanes], unsigned char* line) const {
        const int low = code_of(p.norm.low);
#pragma unroll
        for (int i = 0; i < kLanes; i += kVector) {
            const int c = channel(i, lane);
            if constexpr (kVector == 4) {
                *reinterpret_cast<uint32_t*>(line + code_in_line(c)) =
                    from_lowest(third_bytes(u[i], u[i + 1], u[i + 2], u[i + 3]), low);
            } else if constexpr (kVector == 2) {
                *reinterpret_cast<uint16_t*>(line + code_in_line(c)) =
                    static_cast<uint16_t>(from_lowest(third_bytes(u[i], u[i + 1]), low) & 0xFFFFu);
            } else if (c < CHANNELS) {
                line[code_in_line(c)] = static_cast<unsigned char>(from_lowest(u[i] >> 16 & 0xFFu, low));
            }
        }
    }
};

// The rows' codes as a lane reads them: 16 bytes are an operand as it is.
struct Rows {
    const unsigned char* codes;

    // Operands of both products of a unit, `u` behind `first`.
    __device__ __forceinline__ void read(int first, int u, int units, int i, uint32_t (&one)[4], uint32_t (&two)[4]) const {
        const int lane = threadIdx.x % 32;
        uint4 x[2] = {};
        if (kEven || first + u < units) {
            const int at = (8 * i + lane / 4) * kCodeLine + 2 * (kUnit * (first + u) + lane % 4 * 16);
            x[0] = *reinterpret_cast<const uint4*>(codes + at), x[1] = *reinterpret_cast<const uint4*>(codes + at + 16);
        }
        one[0] = x[0].x, one[1] = x[0].y, one[2] = x[0].z, one[3] = x[0].w;
        two[0] = x[1].x, two[1] = x[1].y, two[2] = x[1].z, two[3] = x[1].w;
    }
};
