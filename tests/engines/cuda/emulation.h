// A GPU's blocks, warps and tensor cores on the CPU, to test the CUDA sources where there is no GPU: every thread of a block is a
// fiber, and what a warp does together (shuffles, ldmatrix, mma) waits until all its lanes have come. Slow, and it finds no
// missing barrier: fibers run one after another.
//
// What kernels have in common is compiled once, in emulation.cpp. This header is read with every kernel, so it includes only C's
// headers: the compiler would take longer for C++'s than for a kernel.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __restrict__
#define __launch_bounds__(...)

struct Dim3 {
    int x = 1, y = 1, z = 1;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};

namespace emulation {

extern int current, threads;  // the thread that runs, of so many
extern long blocks;           // run so far
extern unsigned char* shared;
extern Dim3 block, grid;

void yield();
void barrier();
void warp_barrier();
void launch(void (*kernel)(const void*), const void* args, int gx, int gy, int gz, int count, int bytes);
uint64_t of_lane(uint64_t value, int lane);  // what another lane of the warp gives
unsigned ballot(bool predicate);
struct Quad {
    uint32_t words[4][4];
};
Quad of_quad(const uint32_t (&own)[4]);  // what the four lanes of a quad give

template <class T>
T shuffled(T value, int lane) {
    static_assert(sizeof(T) <= 8, "a register, or two");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = of_lane(bits, lane);
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace emulation

#define blockIdx (emulation::block)
#define gridDim (emulation::grid)
#define threadIdx (Dim3{emulation::current, 0, 0})
#define blockDim (Dim3{emulation::threads, 1, 1})

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp() { emulation::warp_barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::shuffled(value, (emulation::current % 32) ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
    return emulation::shuffled(value, source % 32);
}
inline unsigned __ballot_sync(unsigned, int predicate) { return emulation::ballot(predicate != 0); }
inline int __any_sync(unsigned, int predicate) { return emulation::ballot(predicate != 0) != 0; }

template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
#ifdef QVIT_EMULATION  // C's mathematics has no overloads, CUDA's has
inline float sqrt(float a) { return sqrtf(a); }
inline float exp(float a) { return expf(a); }
inline float log(float a) { return logf(a); }
inline float erf(float a) { return erff(a); }
inline float tanh(float a) { return tanhf(a); }
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
#endif

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
inline int __float_as_int(float a) {
    int b;
    memcpy(&b, &a, 4);
    return b;
}
inline float __int_as_float(int a) {
    float b;
    memcpy(&b, &a, 4);
    return b;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
    unsigned out = 0;
    for (int i = 0; i < 4; i++) {
        out |= static_cast<unsigned>(both >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
    }
    return out;
}
inline float __saturatef(float a) { return a > 0.0f ? a < 1.0f ? a : 1.0f : 0.0f; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned __vminu2(unsigned a, unsigned b) {
    return (a >> 16 < b >> 16 ? a >> 16 : b >> 16) << 16 | ((a & 0xFFFF) < (b & 0xFFFF) ? a & 0xFFFF : b & 0xFFFF);
}
inline unsigned __vabsdiffu4(unsigned a, unsigned b) {
    unsigned out = 0;
    for (int i = 0; i < 32; i += 8) {
        out |= static_cast<unsigned>(abs(static_cast<int>(a >> i & 0xFF) - static_cast<int>(b >> i & 0xFF))) << i;
    }
    return out;
}
template <class T>
T __ldg(const T* from) {
    return *from;
}
inline int __double2loint(double a) {
    uint64_t bits;
    memcpy(&bits, &a, 8);
    return static_cast<int>(bits);
}
inline int __double2hiint(double a) {
    uint64_t bits;
    memcpy(&bits, &a, 8);
    return static_cast<int>(bits >> 32);
}
inline double __hiloint2double(int high, int low) {
    const uint64_t bits = static_cast<uint64_t>(high) << 32 | static_cast<uint32_t>(low);
    double a;
    memcpy(&a, &bits, 8);
    return a;
}
inline int __dp4a(int a, int b, int sum) {
    for (int i = 0; i < 32; i += 8) {
        sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    }
    return sum;
}
inline int __viaddmin_s32_relu(int a, int b, int most) { return max(min(a + b, most), 0); }
inline unsigned __viaddmin_s16x2_relu(unsigned a, unsigned b, unsigned most) {
    unsigned out = 0;
    for (int i = 0; i < 32; i += 16) {
        const int sum = static_cast<int16_t>(static_cast<int16_t>(a >> i) + static_cast<int16_t>(b >> i));
        out |= static_cast<unsigned>(max(min(sum, static_cast<int>(static_cast<int16_t>(most >> i))), 0)) << i;
    }
    return out;
}
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }
inline int atomicExch(int* to, int value) {
    const int old = *to;
    *to = value;
    return old;
}

// What `warp.cuh` has in PTX.

void load_matrices(uint32_t (&to)[4], const void* row);
// The same of transposed matrices of 16-bit elements.
void load_transposed(uint32_t (&to)[4], const void* row);

// d += a b of unsigned bytes a (signed if kSigned) and signed bytes b.
template <bool kSigned>
void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
// The same, b unsigned and a unsigned.
void multiply_unsigned(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Two float16 in one word and back, in whole numbers: nearest even, as `cvt.rn.f16.f32`.
uint32_t to_halves(float a, float b);
void from_halves(uint32_t pair, float& a, float& b);

void touch(void* to, const void* from);
inline void copy_async(void* to, const void* from, bool wanted) {
    wanted ? memcpy(to, from, 16) : memset(to, 0, 16);
}
inline void copy_eight_async(void* to, const void* from) { memcpy(to, from, 8); }
inline uint4 load_once(const void* from) { return *static_cast<const uint4*>(from); }
inline void copies_end_group() {}
template <int kLeft>
inline void copies_wait() {}
inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }
