// LayerNorm in front of a product (NORM): a warpgroup makes the codes of its 64 rows itself, in shared memory, in the layout that
// copies of them would have.
//
// A warp has 16 of these rows, kTogether of them at a time: while they are under way the warpgroup multiplies the rows before, and
// their codes are made behind a tile's epilogue, into the other set of row buffers where there are two. What is computed is what
// `norm.cu` computes, with the clamping that a multiplication does for nothing (`multiply_add_saturated`).
#pragma once

#include "hopper.cuh"

// Lanes take four neighbours each where the width allows it.
constexpr int kVector = CHANNELS % 128 == 0 ? 4 : CHANNELS % 64 == 0 && !BITS ? 2 : 1;

#include "norm_row.cuh"

struct NormedArgs : GemmArgs {
    NormArgs norm;
};

constexpr int kRowsOfWarp = 16, kTogether = kLanes <= 6 ? 4 : kLanes <= 12 ? 2 : 1;
constexpr int kNormSteps = kRowsOfWarp / kTogether;
constexpr bool kWhole32 = CHANNELS % 32 == 0;  // every lane has as many columns
static_assert(RESIDENT, "rows stay");
static_assert(CHANNELS <= (BITS ? 4 : 1) * kChunks * kChunk, "a row's codes have their place");

#ifndef QVIT_EMULATION
// What was written to shared memory is what products read of it from here on: they go another way there than loads and stores do.
__device__ __forceinline__ void proxies_meet() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The warps of one warpgroup; barrier 0 is __syncthreads'.
__device__ __forceinline__ void warpgroup_barrier(int group) {
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
}
#endif

struct Neighbours {
    float x[kVector];
};

// Stays where it is among waits and products, and leaves the first-level cache to what is read again.
__device__ __forceinline__ Neighbours load_neighbours(const float* from) {
    Neighbours to;
#ifdef QVIT_EMULATION
    memcpy(to.x, from, sizeof to.x);
#else
    if constexpr (kVector == 4) {
        asm volatile("ld.global.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(to.x[0]), "=f"(to.x[kVector > 1]), "=f"(to.x[kVector > 2 ? 2 : 0]), "=f"(to.x[kVector > 3 ? 3 : 0])
                     : "l"(from));
    } else if constexpr (kVector == 2) {
        asm volatile("ld.global.L1::no_allocate.v2.f32 {%0, %1}, [%2];"
                     : "=f"(to.x[0]), "=f"(to.x[kVector > 1])
                     : "l"(from));
    } else {
        asm volatile("ld.global.L1::no_allocate.f32 %0, [%1];" : "=f"(to.x[0]) : "l"(from));
    }
#endif
    return to;
}

template <int kCount>
__device__ __forceinline__ void warp_sums(float (&x)[kCount]) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) {
#pragma unroll
        for (int i = 0; i < kCount; i++) {
            x[i] += __shfl_xor_sync(kAll, x[i], mask);
        }
    }
}

// Where byte `byte` of row `row` of a set's 64 rows is.
__device__ __forceinline__ int place_of(int row, int byte) {
    return byte / kChunk * kBytesA + row * kChunk + ((byte % kChunk / 16) ^ (row % 8)) * 16 + byte % 16;
}

// A warp's codes of its values from `first` on, kVector of each lane; the codes are in the last bytes of `codes`.
__device__ __forceinline__ void store_neighbours(unsigned char* set, int row, int first, int lane, const uint32_t (&codes)[kVector]) {
    constexpr int kLast = kVector - 1;
#if BITS
    const bool odd = lane % 2;
    if constexpr (kVector == 4) {
        // Four codes are half a byte of each plane; of two lanes one puts together the upper bits, the other the lower ones.
        const uint32_t four = __byte_perm(__byte_perm(codes[0], codes[1 % kVector], 0x40),
                                          __byte_perm(codes[2 % kVector], codes[kLast], 0x40), 0x5410);
        const uint32_t high = (four >> 1 & 0x01010101u) * 0x01020408u >> 24, low = (four & 0x01010101u) * 0x01020408u >> 24;
        const uint32_t other = __shfl_xor_sync(kAll, odd ? high : low, 1);
        set[place_of(row, bit_at(first, 0) + lane / 2 - (odd ? 0 : 32))] =
            static_cast<unsigned char>(odd ? other | low << 4 : high | other << 4);
    } else {
        const uint32_t high = __ballot_sync(kAll, codes[0] & 2), low = __ballot_sync(kAll, codes[0] & 1);
        if (lane < 2) {
            *reinterpret_cast<uint32_t*>(set + place_of(row, bit_at(first, lane))) = lane ? high : low;
        }
    }
#else
    unsigned char* const to = set + place_of(row, first + kVector * lane);
    if constexpr (kVector == 4) {
        *reinterpret_cast<uint32_t*>(to) = __byte_perm(__byte_perm(codes[0], codes[1 % kVector], 0x40),
                                                       __byte_perm(codes[2 % kVector], codes[kLast], 0x40), 0x5410);
    } else if constexpr (kVector == 2) {
        *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(__byte_perm(codes[0], codes[kLast], 0x40));
    } else {
        *to = static_cast<unsigned char>(codes[0]);
    }
#endif
}

// The codes of a row as they are defined, by the whole warp; its floats are read again, so that nothing is held in registers for a
// case that is rare.
__device__ __noinline__ inline void norm_again(const NormArgs& p, const float* from, unsigned char* set, int row, int lane) {
    float x[kLanes];
    load_row([&](int c) { return from + c; }, lane, x);
    const Moments of = exact_moments(x, lane, p.eps);
#pragma unroll 1
    for (int first = 0; first < CHANNELS; first += 32 * kVector) {
        uint32_t codes[kVector];
#pragma unroll
        for (int e = 0; e < kVector; e++) {
            const int c = first + kVector * lane + e;
            codes[e] = c < CHANNELS ? static_cast<uint32_t>(exact_code(exact_value(p, of, from[c], c), p.offset[c], p.step[c],
                                                                       p.low, p.high))
                                    : 0u;
        }
        store_neighbours(set, row, first, lane, codes);
    }
}

struct NormRows {
    float x[kTogether][kLanes];
};

// Makes the codes of a warp's rows.
struct Normer {
    const NormedArgs& p;
    int first, lane;         // of the warp's rows among the warpgroup's
    int row0 = 0, step = kNormSteps;
    unsigned char* set = nullptr;  // of row buffers: the warpgroup's first row

    __device__ __forceinline__ Normer(const NormedArgs& p, int warp, int lane) : p(p), first(kRowsOfWarp * warp), lane(lane) {}

    // From here on: the rows of the warpgroup that begin at row0, into `to`.
    __device__ __forceinline__ void begin(int row, unsigned char* to) { row0 = row, set = to, step = 0; }
    __device__ __forceinline__ bool is_done() const { return step == kNormSteps; }

    // Beyond the last row it is the last one: its codes go nowhere.
    __device__ __forceinline__ const float* row(int at, int i) const {
        const int r = row0 + first + kTogether * at + i;
        return p.norm.x + static_cast<size_t>(r < p.m ? r : p.m - 1) * CHANNELS;
    }

    // Loads the rows of step `at`.
    __device__ __forceinline__ void fetch(int at, NormRows& to) const {
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
            const float* const from = row(at, i);
#pragma unroll
            for (int k = 0; k < kLanes; k += kVector) {
                const int c = channel(k, lane);
                Neighbours some = {};
                if (kWhole32 || c < CHANNELS) {
                    some = load_neighbours(from + c);
                }
#pragma unroll
                for (int e = 0; e < kVector; e++) {
                    to.x[i][k + e] = some.x[e];
                }
            }
        }
    }

    // Their codes, and the next step.
    __device__ __forceinline__ void write(NormRows& of) {
        float (&x)[kTogether][kLanes] = of.x;
        float mean[kTogether], rstd[kTogether], farthest[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
            float sum[2] = {0.0f, 0.0f};
#pragma unroll
            for (int k = 0; k < kLanes; k++) {
                sum[k % 2] += x[i][k];
            }
            mean[i] = sum[0] + sum[1];
        }
        warp_sums(mean);
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
            mean[i] *= 1.0f / CHANNELS;
            float squares[2] = {0.0f, 0.0f};
#pragma unroll
            for (int k = 0; k < kLanes; k++) {
                x[i][k] = kWhole32 || channel(k, lane) < CHANNELS ? x[i][k] - mean[i] : 0.0f;
                squares[k % 2] = fmaf(x[i][k], x[i][k], squares[k % 2]);
            }
            rstd[i] = squares[0] + squares[1];
        }
        warp_sums(rstd);
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
            rstd[i] = rsqrtf(rstd[i] * (1.0f / CHANNELS) + static_cast<float>(p.norm.eps));
            farthest[i] = 0.0f;  // from a whole number
        }
        const float range = p.norm.high - p.norm.low, whole = kWhole + p.norm.low;
        const int line = first + kTogether * step;
#pragma unroll
        for (int k = 0; k < kLanes; k += kVector) {
            float gain[kVector], shift[kVector];
            load_columns(p.norm.place_gain, channel(k, lane), gain);
            load_columns(p.norm.place_shift, channel(k, lane), shift);
#pragma unroll
            for (int i = 0; i < kTogether; i++) {
                uint32_t codes[kVector];
#pragma unroll
                for (int e = 0; e < kVector; e++) {
                    const float v = multiply_add_saturated(x[i][k + e] * rstd[i], gain[e], shift[e]);
                    const float rounded = fmaf(v, range, whole);  // its last bits are the code's
                    farthest[i] = fmaxf(farthest[i], fabsf(fmaf(v, range, whole - rounded)));
                    codes[e] = static_cast<uint32_t>(__float_as_int(rounded));
                }
                store_neighbours(set, line + i, 32 * k, lane, codes);
            }
        }
        bool close[kTogether], any = false;
#pragma unroll
        for (int i = 0; i < kTogether; i++) {
            close[i] = farthest[i] > 0.5f - p.norm.margin * (1.0f + 0.25f * fabsf(mean[i]) * rstd[i]);
            any |= close[i];
        }
        if (__any_sync(kAll, any)) {  // which also lets all have stored their codes
#pragma unroll
            for (int i = 0; i < kTogether; i++) {
                if (__any_sync(kAll, close[i])) {
                    norm_again(p.norm, row(step, i), set, line + i, lane);
                }
            }
        }
        step++;
    }

    // All rows at once, the next ones on their way while codes are made.
    __device__ __forceinline__ void finish() {
        NormRows now, next;
        fetch(0, now);
#pragma unroll 1
        while (!is_done()) {
            fetch(step + 1 < kNormSteps ? step + 1 : step, next);
            write(now);
            now = next;
        }
    }

private:
    // A lane's constants of kVector columns from c on. They stay in the first-level cache.
    __device__ __forceinline__ static void load_columns(const float* from, int c, float (&to)[kVector]) {
        if constexpr (kVector == 4) {
            const float4 four = load_constant(reinterpret_cast<const float4*>(from + c));
            to[0] = four.x, to[1 % kVector] = four.y, to[2 % kVector] = four.z, to[3 % kVector] = four.w;
        } else {
#pragma unroll
            for (int e = 0; e < kVector; e++) {
                to[e] = kWhole32 || c + e < CHANNELS ? load_constant(from + c + e) : 0.0f;
            }
        }
    }
};
