// LayerNorm of float32 rows (or none, where IDENTITY), and the codes of what comes out; a warp a row.
//
// GATHER: a row is put together of so many rows of x, CHANNELS / GATHER wide each: one for the tokens of Swin's windows, four for
// the neighbours that patch merging joins.
#include "layout.cuh"
#include "rounding.cuh"

struct NormArgs {
    const float* x;       // rows, ldx apart
    const float* weight;  // [C]
    const float* bias;
    const float* gain;    // [C]: weight / step, and (bias - offset) / step
    const float* shift;
    const float* offset;  // of the codes [C]
    const float* step;
    const int* index;     // GATHER: [rows, GATHER], rows of x
    void* out;            // codes, ldo tiles a row, or floats, rows ldo apart
    long long ldx, ldo;
    int rows;
    float low, high, margin;
    double eps;
};

constexpr int kThreads = 32 * WARPS;
constexpr int kLanes = (CHANNELS + 31) / 32;  // values a lane

// Lanes take four neighbours each where the width allows it; for planes of bits a word is one value of each lane.
constexpr int kVector = OUT_BITS ? 1 : CHANNELS % 128 == 0 ? 4 : CHANNELS % 64 == 0 ? 2 : 1;

__device__ __forceinline__ int channel(int i, int lane) { return i / kVector * 32 * kVector + lane * kVector + i % kVector; }

struct Moments {
    double mean, rstd;
};

__device__ inline Moments exact_moments(const float (&x)[kLanes], int lane, double eps) {
    double sum = 0.0, squares = 0.0;
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        sum += channel(i, lane) < CHANNELS ? static_cast<double>(x[i]) : 0.0;
    }
    const double mean = warp_sum(sum) / CHANNELS;
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const double d = channel(i, lane) < CHANNELS ? static_cast<double>(x[i]) - mean : 0.0;
        squares += d * d;
    }
    return {mean, 1.0 / sqrt(warp_sum(squares) / CHANNELS + eps)};
}

__device__ __forceinline__ float exact_value(const NormArgs& p, const Moments& of, float x, int c) {
    const double z = (static_cast<double>(x) - of.mean) * of.rstd;
    return __double2float_rn(z * static_cast<double>(p.weight[c]) + static_cast<double>(p.bias[c]));
}

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads) kernel(const NormArgs p) {
    await_former_kernel();
    const int lane = threadIdx.x % 32;
    const long long row = static_cast<long long>(blockIdx.x) * WARPS + threadIdx.x / 32;
    if (row >= p.rows) {
        return;
    }
#if GATHER
    constexpr int kPiece = CHANNELS / GATHER;
    static_assert(CHANNELS % GATHER == 0 && kPiece % kVector == 0, "a lane's neighbours lie in one row");
    const auto at = [&](int c) { return p.x + static_cast<size_t>(p.index[row * GATHER + c / kPiece]) * p.ldx + c % kPiece; };
#else
    const float* const from = p.x + row * p.ldx;
    const auto at = [&](int c) { return from + c; };
#endif
    float x[kLanes];
#pragma unroll
    for (int i = 0; i < kLanes; i += kVector) {
        const int c = channel(i, lane);
        if constexpr (kVector == 4) {
            const float4 four = *reinterpret_cast<const float4*>(at(c));
            x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
        } else if constexpr (kVector == 2) {
            const float2 two = *reinterpret_cast<const float2*>(at(c));
            x[i] = two.x, x[i + 1] = two.y;
        } else {
            x[i] = c < CHANNELS ? *at(c) : 0.0f;
        }
    }
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
    float* out = static_cast<float*>(p.out) + row * p.ldo;
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const int c = channel(i, lane);
        if (c < CHANNELS) {
            out[c] = exact_value(p, of, x[i], c);
        }
    }
#else
    float sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        sum += x[i];
    }
    const float mean = warp_sum(sum) * (1.0f / CHANNELS);
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const float d = channel(i, lane) < CHANNELS ? x[i] - mean : 0.0f;
        squares = fmaf(d, d, squares);
    }
    const float rstd = rsqrtf(warp_sum(squares) * (1.0f / CHANNELS) + static_cast<float>(p.eps));
    const float margin = p.margin * (1.0f + 0.25f * fabsf(mean) * rstd);
    int codes[kLanes];
    bool close = false;
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const int c = channel(i, lane);
        codes[i] = 0;
        if (c < CHANNELS) {
            const float v = clamp(fmaf((x[i] - mean) * rstd, p.gain[c], p.shift[c]), p.low, p.high);
            close |= is_close(v, margin);
            codes[i] = code_of(v);
        }
    }
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
#pragma unroll
    for (int i = 0; i < kLanes; i += kVector) {
        const int c = channel(i, lane);
        if constexpr (kVector == 4) {
            *reinterpret_cast<uint32_t*>(out + code_at(line, c, chunks)) =
                (codes[i] & 0xFF) | (codes[i + 1] & 0xFF) << 8 | (codes[i + 2] & 0xFF) << 16 | (codes[i + 3] & 0xFFu) << 24;
        } else if constexpr (kVector == 2) {
            *reinterpret_cast<uint16_t*>(out + code_at(line, c, chunks)) = static_cast<uint16_t>((codes[i] & 0xFF) | (codes[i + 1] & 0xFF) << 8);
        } else if (c < CHANNELS) {
            out[code_at(line, c, chunks)] = static_cast<uint8_t>(codes[i]);
        }
    }
#endif
#endif
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const NormArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
