// LayerNorm of rows of floats (or none, where IDENTITY), and the codes of what comes out; a warp a row.
//
// GATHER: a row is put together of so many rows of x, CHANNELS / GATHER wide each: one for the tokens of Swin's windows, four for
// the neighbours that patch merging joins.
#include "layout.cuh"

constexpr int kThreads = 32 * WARPS;

// Lanes take four neighbours each where the width allows it; for planes of bits a word is then one value of each lane, or a lane
// has half a byte of each plane.
constexpr int kVector = CHANNELS % 128 == 0 ? 4 : OUT_BITS ? 1 : CHANNELS % 64 == 0 ? 2 : 1;

#include "norm_places.cuh"

// Where a value of a row is.
__device__ __forceinline__ const Source* source_of(const NormArgs& p, long long row, int c) {
#if GATHER
    constexpr int kPiece = CHANNELS / GATHER;
    static_assert(CHANNELS % GATHER == 0 && kPiece % kVector == 0, "a lane's neighbours lie in one row");
    return p.x + static_cast<size_t>(p.index[row * GATHER + c / kPiece]) * p.ldx + c % kPiece;
#else
    return p.x + row * p.ldx + c;
#endif
}

#if IDENTITY  // codes of the row as it is

__device__ __forceinline__ void write(const NormArgs& p, const float (&x)[kLanes], long long row, int lane) {
    uint8_t* out = static_cast<uint8_t*>(p.out);
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const int c = channel(i, lane);
        if (c < CHANNELS) {
            out[code_at(static_cast<int>(row), c, static_cast<int>(p.ldo))] =
                static_cast<uint8_t>(exact_code(x[i], p.offset[c], p.step[c], p.low, p.high));
        }
    }
}

#elif OUT_FLOAT

__device__ __forceinline__ void write(const NormArgs& p, const float (&x)[kLanes], long long row, int lane) {
    const Moments of = exact_moments(x, lane, p.eps);
    Stream* out = static_cast<Stream*>(p.out) + row * p.ldo;
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const int c = channel(i, lane);
        if (c < CHANNELS) {
            store_value(out + c, exact_value(p, of, x[i], c));
        }
    }
}

#else

// Codes less the lowest one in third bytes go out; of two bits as planes.
__device__ __forceinline__ void store_codes(const NormArgs& p, const uint32_t (&u)[kLanes], long long row, int lane) {
    uint8_t* const out = static_cast<uint8_t*>(p.out);
    const int line = static_cast<int>(row), chunks = static_cast<int>(p.ldo);
#if OUT_BITS
    if constexpr (kVector == 4) {
        // Of four neighbours, half a byte of each plane; a lane and its neighbour make whole bytes, of the lower plane and the higher.
        constexpr int kFours = kVector == 4 ? kLanes / 4 : 1, kWords = (kFours + 3) / 4;
        uint32_t planes[2][kWords * 4] = {};
#pragma unroll
        for (int i = 0; i < kFours; i++) {
            const uint32_t codes = third_bytes(u[4 * i], u[4 * i + 1], u[4 * i + 2], u[4 * i + 3]);
            planes[0][i] = (codes & 0x01010101u) * 0x01020408u;  // four bits meet in the lower half of the highest byte
            planes[1][i] = (codes & 0x02020202u) * 0x00810204u;
        }
        const int odd = lane % 2;
#pragma unroll
        for (int word = 0; word < kWords; word++) {
            uint32_t halves[2];
#pragma unroll
            for (int plane = 0; plane < 2; plane++) {
                const uint32_t* of = planes[plane] + 4 * word;
                halves[plane] = __byte_perm(__byte_perm(of[0], of[1], 0x0073), __byte_perm(of[2], of[3], 0x0073), 0x5410);
            }
            const uint32_t other = __shfl_xor_sync(kAll, odd ? halves[0] : halves[1], 1);
            const uint32_t bytes = odd ? other | halves[1] << 4 : halves[0] | other << 4;
#pragma unroll
            for (int i = 4 * word; i < 4 * word + 4 && i < kFours; i++) {
                out[code_at(line, bit_at(128 * i, odd), chunks) + lane / 2] = static_cast<uint8_t>(bytes >> (8 * (i % 4)));
            }
        }
    } else {
        uint32_t high = 0, low = 0;
#pragma unroll
        for (int i = 0; i < kLanes; i++) {
            const uint32_t words[2] = {__ballot_sync(kAll, u[i] & 0x10000u), __ballot_sync(kAll, u[i] & 0x20000u)};
            low = lane == i ? words[0] : low;
            high = lane == i ? words[1] : high;
        }
        if (lane < kLanes) {
            *reinterpret_cast<uint32_t*>(out + code_at(line, bit_at(32 * lane, 1), chunks)) = high;
            *reinterpret_cast<uint32_t*>(out + code_at(line, bit_at(32 * lane, 0), chunks)) = low;
        }
    }
#else
    const int low = code_of(p.low);
#pragma unroll
    for (int i = 0; i < kLanes; i += kVector) {
        const int c = channel(i, lane);
        uint8_t* const to = out + code_at(line, c, chunks);
        if constexpr (kVector == 4) {
            *reinterpret_cast<uint32_t*>(to) = from_lowest(third_bytes(u[i], u[i + 1], u[i + 2], u[i + 3]), low);
        } else if constexpr (kVector == 2) {
            *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(from_lowest(third_bytes(u[i], u[i + 1]), low));
        } else if (c < CHANNELS) {
            *to = static_cast<uint8_t>(from_lowest(u[i] >> 16 & 0xFFu, low));
        }
    }
#endif
}

// The codes in doubt of a row, as they are defined. There is one in every eighth to sixtieth row, and others wait for it: so little
// code as can be, which is seldom at hand.
__device__ __forceinline__ void decide(const NormArgs& p, const float (&x)[kLanes], long long row, int lane, RowPlaces& of) {
    const Moments moments = moments_near<CHANNELS>(x, of.mean, p.eps, [&](int i) { return channel(i, lane) < CHANNELS; });
#pragma unroll
    for (int first = 0; first < kLanes; first += 32) {
        uint32_t doubts = 0;  // a bit for each of the lane's next values
#pragma unroll
        for (int i = first; i < kLanes && i < first + 32; i++) {
            const bool there = CHANNELS % 32 == 0 || channel(i, lane) < CHANNELS;
            doubts |= static_cast<uint32_t>(there && of.doubts(i)) << (i - first);
        }
#pragma unroll 1
        while (doubts != 0) {
            const int which = first + __ffs(static_cast<int>(doubts)) - 1, c = channel(which, lane);
            doubts &= doubts - 1;
            const int code = exact_code_at(p, moments, value_of(*source_of(p, row, c)), c) - code_of(p.low);
#pragma unroll
            for (int i = first; i < kLanes && i < first + 32; i++) {
                of.u[i] = i == which ? static_cast<uint32_t>(code) << 16 : of.u[i];
            }
        }
    }
}

template <class Gain, class Shift>
__device__ __forceinline__ void write(const NormArgs& p, const float (&x)[kLanes], long long row, int lane, const Gain& gain,
                                      const Shift& shift) {
    RowPlaces of = places_of(p, x, gain, shift, lane);
    if (__any_sync(kAll, of.close)) {
        decide(p, x, row, lane, of);
    }
    store_codes(p, of.u, row, lane);
}

#endif

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads) kernel(const NormArgs p) {
    const int lane = threadIdx.x % 32;
#if !IDENTITY && !OUT_FLOAT
    constexpr bool kEarly = kLanes <= 24;  // registers hold constants beside the row
    float gain[kLanes], shift[kLanes];
    if (kEarly) {
        load_row([&](int c) { return p.gain + c; }, lane, gain);
        load_row([&](int c) { return p.shift + c; }, lane, shift);
    }
#endif
    await_former_kernel();
    const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (row >= p.rows) {
        return;
    }
    float x[kLanes];
    load_row([&](int c) { return source_of(p, row, c); }, lane, x);
#if IDENTITY || OUT_FLOAT
    write(p, x, row, lane);
#else
    write(
        p, x, row, lane, [&](int i) { return kEarly ? gain[i] : p.gain[channel(i, lane)]; },
        [&](int i) { return kEarly ? shift[i] : p.shift[channel(i, lane)]; });
#endif
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const NormArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
