// What a warp of 32 lanes does together, and the copies that feed it: tensor-core products, ldmatrix, asynchronous copies.
//
// Fragments of a product D[16, 8] += A[16, 32] B[8, 32]^T of bytes; g = lane / 4, t = lane % 4:
//
//     A   a[0]: row g,     bytes 4t .. 4t + 3        a[2]: row g,     bytes 16 + 4t ..
//         a[1]: row g + 8, bytes 4t ..               a[3]: row g + 8, bytes 16 + 4t ..
//     B   b[0]: column g,  bytes 4t ..               b[1]: column g,  bytes 16 + 4t ..
//     D   d[0], d[1]: row g, columns 2t, 2t + 1      d[2], d[3]: row g + 8
//
// Source: PTX ISA, "Matrix Fragments for mma.m16n8k32".
#pragma once

#ifdef QVIT_EMULATION
#include "emulation.h"
#define QVIT_SHARED(name) unsigned char* const name = emulation::shared
#define QVIT_CONSTANT
#else
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#define QVIT_CONSTANT __grid_constant__  // arguments that are read where they are, also by functions that are not inlined
#define QVIT_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#define INFINITY __int_as_float(0x7f800000)
#endif

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kTouched = 32;  // bytes that `touch` brings near

#ifndef QVIT_EMULATION  // else in emulation.h

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 16-byte matrices: lane l gives the address of row l % 8 of matrix l / 8, and gets of each its row l / 4, word l % 4.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row)));
}

#define QVIT_MMA(shape, types)                                                                                    \
    asm volatile("mma.sync.aligned." shape ".row.col." types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// d += a b of unsigned bytes a (signed if kSigned) and signed bytes b.
template <bool kSigned>
__device__ __forceinline__ void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kSigned) {
        QVIT_MMA("m16n8k32", "s32.s8.s8.s32");
    } else {
        QVIT_MMA("m16n8k32", "s32.u8.s8.s32");
    }
}
// The same, b unsigned and a unsigned.
__device__ __forceinline__ void multiply_unsigned(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    QVIT_MMA("m16n8k32", "s32.u8.u8.s32");
}

// 16 bytes from global to shared memory; zeros where they are not wanted.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool wanted) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(wanted ? 16 : 0)
                 : "memory");
}
// The same of eight bytes.
__device__ __forceinline__ void copy_eight_async(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// 4 bytes, for the first-level cache's sake: the kTouched bytes around `from`, the least that it takes, will soon be loaded. Nobody
// reads `to`, which is yet no other copy's place: where two have one, racecheck reports it.
__device__ __forceinline__ void touch(void* to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// 16 bytes that are read once: they leave the first-level cache to others.
__device__ __forceinline__ uint4 load_once(const void* from) {
    uint4 x;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from) : "memory");
    return x;
}
__device__ __forceinline__ void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kLeft groups of copies are under way.
template <int kLeft>
__device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif

// The next kernel's blocks may come, once all of this one's have come here. Such a block waits for this kernel to end before it reads
// what kernels write, and this one ends after the one before it, so it may be said before `await_former_kernel` too.
__device__ __forceinline__ void announce() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The thread's number, read again: what follows from it is computed where it is used, and registers are not held in between.
__device__ __forceinline__ int thread_again() {
    int thread = threadIdx.x;
#ifndef QVIT_EMULATION
    asm volatile("" : "+r"(thread));
#endif
    return thread;
}
// An address, or a place, is computed here, and not behind what is waited for before it is used. An address is then of memory of any
// kind: only for copies, which know of what kind.
template <class T>
__device__ __forceinline__ void hold(T& place) {
    static_assert(sizeof(T) == 8, "a register of 64 bits");
#ifndef QVIT_EMULATION
    asm volatile("" : "+l"(place));
#endif
}

// First of all in every thread of every kernel: until the kernel before has ended, and what it wrote can be read. Launches of one
// forward pass may overlap (programmatic dependent launch, compute capability 9): the next kernel's blocks come as soon as this
// one's have all come here, and wait here themselves. So only constants may be read before it. Without it in a single kernel, a
// kernel could still write what the one after the next has begun to read.
__device__ __forceinline__ void await_former_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    announce();
}

// Over the four lanes that hold one row of a fragment.
template <class T>
__device__ __forceinline__ T quad_sum(T x) {
    x += __shfl_xor_sync(kAll, x, 1);
    return x + __shfl_xor_sync(kAll, x, 2);
}
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
    for (int mask = 16; mask > 0; mask /= 2) {
        x += __shfl_xor_sync(kAll, x, mask);
    }
    return x;
}
