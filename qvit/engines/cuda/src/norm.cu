// LayerNorm of rows of floats (or none, where IDENTITY), and the codes of what comes out; a warp a row.
//
// GATHER: a row is put together of so many rows of x, CHANNELS / GATHER wide each: one for the tokens of Swin's windows, four for
// the neighbours that patch merging joins.
#include "layout.cuh"

constexpr int kThreads = 32 * WARPS;

// Lanes take four neighbours each where the width allows it; for planes of bits a word is one value of each lane.
constexpr int kVector = OUT_BITS ? 1 : CHANNELS % 128 == 0 ? 4 : CHANNELS % 64 == 0 ? 2 : 1;

#include "norm_row.cuh"

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
#if GATHER
    constexpr int kPiece = CHANNELS / GATHER;
    static_assert(CHANNELS % GATHER == 0 && kPiece % kVector == 0, "a lane's neighbours lie in one row");
    const auto at = [&](int c) { return p.x + static_cast<size_t>(p.index[row * GATHER + c / kPiece]) * p.ldx + c % kPiece; };
#else
    const Source* const from = p.x + row * p.ldx;
    const auto at = [&](int c) { return from + c; };
#endif
    float x[kLanes];
    load_row(at, lane, x);
#if IDENTITY  // codes of the row as it is
    uint8_t* out = static_cast<uint8_t*>(p.out);
    const int line = static_cast<int>(row), chunks = static_cast<int>(p.ldo);
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const int c = channel(i, lane);
        if (c < CHANNELS) {
            out[code_at(line, c, chunks)] = static_cast<uint8_t>(exact_code(x[i], p.offset[c], p.step[c], p.low, p.high));
        }
    }
#elif OUT_FLOAT
    const Moments of = exact_moments(x, lane, p.eps);
    Stream* out = static_cast<Stream*>(p.out) + row * p.ldo;
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const int c = channel(i, lane);
        if (c < CHANNELS) {
            store_value(out + c, exact_value(p, of, x[i], c));
        }
    }
#else
    int codes[kLanes];
    bool close = false;
    row_codes(
        p, x, [&](int i) { return kEarly ? gain[i] : p.gain[channel(i, lane)]; },
        [&](int i) { return kEarly ? shift[i] : p.shift[channel(i, lane)]; }, lane, codes, [&](int) { close = true; });
    if (__any_sync(kAll, close)) {
        const Moments of = exact_moments(x, lane, p.eps);
        if (close) {
#pragma unroll
            for (int i = 0; i < kLanes; i++) {
                const int c = channel(i, lane);
                if (c < CHANNELS) {
                    codes[i] = exact_code(exact_value(p, of, x[i], c), p.offset[c], p.step[c], p.low, p.high);
                }
            }
        }
    }
    uint8_t* out = static_cast<uint8_t*>(p.out);
    const int line = static_cast<int>(row), chunks = static_cast<int>(p.ldo);
#if OUT_BITS
    uint32_t high = 0, low = 0;
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const uint32_t words[2] = {__ballot_sync(kAll, codes[i] & 1), __ballot_sync(kAll, codes[i] & 2)};
        low = lane == i ? words[0] : low;
        high = lane == i ? words[1] : high;
    }
    if (lane < kLanes) {
        *reinterpret_cast<uint32_t*>(out + code_at(line, bit_at(32 * lane, 1), chunks)) = high;
        *reinterpret_cast<uint32_t*>(out + code_at(line, bit_at(32 * lane, 0), chunks)) = low;
    }
#else
    store_row([&](int c) { return out + code_at(line, c, chunks); }, lane, codes);
#endif
#endif
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const NormArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
