// LayerNorm of rows of floats (or none, where IDENTITY), and the codes of what comes out; a warp a row, or one row
// after the other (RING).
//
// GATHER: a row is put together of so many rows of x, CHANNELS / GATHER wide each: one for the tokens of Swin's windows, four for
// the neighbours that patch merging joins.
#include "layout.cuh"

constexpr int kThreads = 32 * WARPS;

// Lanes take four neighbours each where the width allows it; for planes of bits a word is then one value of each lane, or a lane
// has half a byte of each plane.
constexpr int kVector = CHANNELS % 128 == 0 ? 4 : OUT_BITS ? 1 : CHANNELS % 64 == 0 ? 2 : 1;

#include "norm_places.cuh"

__device__ __forceinline__ void load(const NormArgs& p, long long row, int lane, float (&x)[kLanes]) {
#if GATHER
    constexpr int kPiece = CHANNELS / GATHER;
    static_assert(CHANNELS % GATHER == 0 && kPiece % kVector == 0, "a lane's neighbours lie in one row");
    load_row([&](int c) { return p.x + static_cast<size_t>(p.index[row * GATHER + c / kPiece]) * p.ldx + c % kPiece; }, lane, x);
#else
    const Source* const from = p.x + row * p.ldx;
    load_row([&](int c) { return from + c; }, lane, x);
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
        constexpr int kFours = kLanes / 4, kWords = (kFours + 3) / 4;
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

// Codes in doubt of a row, as they are defined; a function of its own, so that the others' registers hold nothing for it.
__device__ __noinline__ inline void codes_again(const NormArgs& p, long long row, int lane, uint32_t doubts, uint32_t* u) {
    float x[kLanes];
    load(p, row, lane, x);
    const Moments of = exact_moments(x, lane, p.eps);
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const int c = channel(i, lane);
        if (c < CHANNELS && (doubts >> i % 32 & 1)) {
            u[i] = static_cast<uint32_t>(exact_code(exact_value(p, of, x[i], c), p.offset[c], p.step[c], p.low, p.high) -
                                         code_of(p.low))
                   << 16;
        }
    }
}

template <class Gain, class Shift>
__device__ __forceinline__ void write(const NormArgs& p, const float (&x)[kLanes], long long row, int lane, const Gain& gain,
                                      const Shift& shift) {
    RowPlaces of = places_of(p, x, gain, shift, lane);
    if (__any_sync(kAll, of.close)) {
        uint32_t again[kLanes], doubts = 0;  // of wide rows a bit is of several values
#pragma unroll
        for (int i = 0; i < kLanes; i++) {
            again[i] = of.u[i];
            doubts |= static_cast<uint32_t>(of.doubts(i)) << i % 32;
        }
        codes_again(p, row, lane, doubts, again);
#pragma unroll
        for (int i = 0; i < kLanes; i++) {
            of.u[i] = again[i];
        }
    }
    store_codes(p, of.u, row, lane);
}

#endif

#if RING

// A warp goes through rows, each of which has come to its part of shared memory while those before it were worked on; what is known
// of channels stays in registers.
#include "hopper.cuh"

constexpr int kRowBytes = CHANNELS * static_cast<int>(sizeof(Source));
static_assert(kRowBytes % 16 == 0 && !GATHER && !IDENTITY && !OUT_FLOAT, "bulk copies, and codes behind a norm");

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads, BLOCKS) kernel(const QVIT_CONSTANT NormArgs p) {
    QVIT_SHARED(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    unsigned char* const slots = memory + warp * RING * kRowBytes;
    Barrier* const full = reinterpret_cast<Barrier*>(memory + WARPS * RING * kRowBytes) + warp * RING;
    if (lane == 0) {
        for (int i = 0; i < RING; i++) {
            barrier_init(full + i, 1);
        }
        barriers_ready();
        proxies_meet();
    }
    __syncwarp();
    float gain[kLanes], shift[kLanes];
    load_row([&](int c) { return p.gain + c; }, lane, gain);
    load_row([&](int c) { return p.shift + c; }, lane, shift);
    await_former_kernel();
    const int first = blockIdx.x * WARPS + warp, step = gridDim.x * WARPS;
    const auto send_for = [&](int row, int slot) {
        if (row < p.rows) {
            barrier_expect(full + slot, kRowBytes);
            copy_tile(slots + slot * kRowBytes, p.x + row * p.ldx, kRowBytes, full + slot);
        }
    };
    if (lane == 0) {
        for (int i = 0; i < RING; i++) {
            send_for(first + i * step, i);
        }
    }
    int slot = 0, phase = 0;
#pragma unroll 1
    for (int row = first; row < p.rows; row += step) {
        barrier_wait(full + slot, phase);
        const Source* const from = reinterpret_cast<const Source*>(slots + slot * kRowBytes);
        float x[kLanes];
        load_row([&](int c) { return from + c; }, lane, x);
        __syncwarp();  // all of the slot has been read
        if (lane == 0) {
            send_for(row + RING * step, slot);
        }
        write(
            p, x, row, lane, [&](int i) { return gain[i]; }, [&](int i) { return shift[i]; });
        slot = slot + 1 < RING ? slot + 1 : 0;
        phase ^= static_cast<int>(slot == 0);
    }
}

#else

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads) kernel(const QVIT_CONSTANT NormArgs p) {
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
    load(p, row, lane, x);
#if IDENTITY || OUT_FLOAT
    write(p, x, row, lane);
#else
    write(
        p, x, row, lane, [&](int i) { return kEarly ? gain[i] : p.gain[channel(i, lane)]; },
        [&](int i) { return kEarly ? shift[i] : p.shift[channel(i, lane)]; });
#endif
}

#endif

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const NormArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
