// A GPU's blocks, warps and tensor cores on the CPU, to test the CUDA sources where there is no GPU: every thread of a block is a
// fiber, and what a warp does together (shuffles, ldmatrix, mma) waits until all its lanes have come. Slow, and it finds no
// missing barrier: fibers run one after another.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <set>
#include <vector>

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

constexpr int kStack = 256 * 1024;

struct Fiber {
    ucontext_t context;
    jmp_buf at;
    bool started = false, done = false;
    std::vector<char> stack;
};

struct Warp {
    int arrived = 0;
    long turn = 0;
    unsigned char in[32][32];
    unsigned char out[32][32];
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline jmp_buf scheduler;
inline int current, threads, waiting;
inline long barrier_turn, touched_twice;
inline std::set<const void*> touched;  // places of a block's touches
inline unsigned char* shared;
inline Dim3 block, grid;
inline void (*body)(const void*);
inline const void* arguments;

inline void yield() {
    if (!_setjmp(fibers[current].at)) {
        _longjmp(scheduler, 1);
    }
}

inline void entry() {
    body(arguments);
    fibers[current].done = true;
    _longjmp(scheduler, 1);
}

// All lanes of a warp give `in`; when the last one has, `work(in, out)` fills all of `out`.
template <class In, class Out, class Work>
Out together(const In& in, const Work& work) {
    static_assert(sizeof(In) <= 32 && sizeof(Out) <= 32);
    Warp& warp = warps[current / 32];
    const int lane = current % 32;
    memcpy(warp.in[lane], &in, sizeof in);
    const long turn = warp.turn;
    if (++warp.arrived == 32) {
        In all[32];
        Out results[32];
        for (int i = 0; i < 32; i++) {
            memcpy(&all[i], warp.in[i], sizeof(In));
        }
        work(all, results);
        for (int i = 0; i < 32; i++) {
            memcpy(warp.out[i], &results[i], sizeof(Out));
        }
        warp.arrived = 0;
        warp.turn++;
    }
    while (warp.turn == turn) {
        yield();
    }
    Out out;
    memcpy(&out, warp.out[lane], sizeof out);
    return out;
}

inline void barrier() {
    const long turn = barrier_turn;
    if (++waiting == threads) {
        waiting = 0;
        barrier_turn++;
    }
    while (barrier_turn == turn) {
        yield();
    }
}

inline void run_block() {
    for (auto& fiber : fibers) {
        fiber.started = fiber.done = false;
    }
    touched.clear();
    int left = threads;
    while (left > 0) {
        for (current = 0; current < threads; current++) {
            Fiber& fiber = fibers[current];
            if (fiber.done) {
                continue;
            }
            if (_setjmp(scheduler)) {
                left -= fibers[current].done;
                continue;
            }
            if (fiber.started) {
                _longjmp(fiber.at, 1);
            }
            fiber.started = true;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, entry, 0);
            setcontext(&fiber.context);
        }
    }
}

inline void launch(void (*kernel)(const void*), const void* args, int gx, int gy, int gz, int count, int bytes) {
    threads = count;
    fibers.resize(count);
    for (auto& fiber : fibers) {
        fiber.stack.resize(kStack);
    }
    warps.assign((count + 31) / 32, Warp());
    std::vector<unsigned char> memory(bytes + 1024, 0xA5);  // poisoned: nothing may read what was not written
    shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.data()) + 1023) / 1024 * 1024);
    body = kernel;
    arguments = args;
    grid = {gx, gy, gz};
    for (block.z = 0; block.z < gz; block.z++) {
        for (block.y = 0; block.y < gy; block.y++) {
            for (block.x = 0; block.x < gx; block.x++) {
                waiting = 0;
                run_block();
            }
        }
    }
}

// Touches so far that had another's place: racecheck would report them.
extern "C" __attribute__((used)) long emulated_touched_twice() { return touched_twice; }

}  // namespace emulation

#define blockIdx (emulation::block)
#define gridDim (emulation::grid)
#define threadIdx (Dim3{emulation::current, 0, 0})
#define blockDim (Dim3{emulation::threads, 1, 1})

inline void __syncthreads() { emulation::barrier(); }
inline void __syncwarp() {
    emulation::together<int, int>(0, [](const int*, int* out) { memset(out, 0, 32 * sizeof *out); });
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::together<T, T>(value, [&](const T* in, T* out) {
        for (int i = 0; i < 32; i++) {
            out[i] = in[i ^ mask];
        }
    });
}

template <class T>
T __shfl_sync(unsigned, T value, int source) {
    struct In {
        T value;
        int source;
    };
    return emulation::together<In, T>({value, source}, [](const In* in, T* out) {
        for (int i = 0; i < 32; i++) {
            out[i] = in[in[i].source % 32].value;
        }
    });
}

inline int __any_sync(unsigned, int predicate) {
    return emulation::together<int, int>(predicate, [](const int* in, int* out) {
        int any = 0;
        for (int i = 0; i < 32; i++) {
            any |= in[i] != 0;
        }
        for (int i = 0; i < 32; i++) {
            out[i] = any;
        }
    });
}

inline unsigned __ballot_sync(unsigned, int predicate) {
    return emulation::together<int, unsigned>(predicate, [](const int* in, unsigned* out) {
        unsigned bits = 0;
        for (int i = 0; i < 32; i++) {
            bits |= static_cast<unsigned>(in[i] != 0) << i;
        }
        for (int i = 0; i < 32; i++) {
            out[i] = bits;
        }
    });
}

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
inline int __viaddmin_s32_relu(int a, int b, int most) { return std::max(std::min(a + b, most), 0); }
inline unsigned __viaddmin_s16x2_relu(unsigned a, unsigned b, unsigned most) {
    unsigned out = 0;
    for (int i = 0; i < 32; i += 16) {
        const int sum = static_cast<int16_t>(static_cast<int16_t>(a >> i) + static_cast<int16_t>(b >> i));
        out |= static_cast<unsigned>(std::max(std::min(sum, static_cast<int>(static_cast<int16_t>(most >> i))), 0)) << i;
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
using std::max;
using std::min;

// What `warp.cuh` has in PTX.

struct Four {
    uint32_t x[4];
};
struct Operands {
    uint32_t a[4], b[2];
};

inline void load_matrices(uint32_t (&to)[4], const void* row) {
    const Four out = emulation::together<const void*, Four>(row, [](const void* const* rows, Four* out) {
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 4; i++) {
                memcpy(&out[lane].x[i], static_cast<const char*>(rows[8 * i + lane / 4]) + 4 * (lane % 4), 4);
            }
        }
    });
    memcpy(to, out.x, sizeof out);
}

template <class Product>
inline void multiply_with(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Product& product) {
    Operands in;
    memcpy(in.a, a, sizeof a);
    memcpy(in.b, b, sizeof b);
    const Four out = emulation::together<Operands, Four>(in, [&](const Operands* in, Four* out) {
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                int sum = 0;
                for (int word = 0; word < 8; word++) {
                    const Operands &left = in[4 * (row % 8) + word % 4], &right = in[4 * column + word % 4];
                    sum += product(left.a[row / 8 + 2 * (word / 4)], right.b[word / 4]);
                }
                out[lane].x[i] = static_cast<uint32_t>(sum);
            }
        }
    });
    for (int i = 0; i < 4; i++) {
        d[i] += static_cast<int>(out.x[i]);
    }
}

template <class A, class B>
inline int byte_product(uint32_t a, uint32_t b) {
    int sum = 0;
    for (int i = 0; i < 32; i += 8) {
        sum += static_cast<A>(a >> i) * static_cast<B>(b >> i);
    }
    return sum;
}

// float16 and back, in whole numbers: nearest even, as `cvt.rn.f16.f32`.
inline unsigned to_half(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    const uint32_t sign = u >> 16 & 0x8000, size = u & 0x7FFFFFFF;
    if (size >= 0x7F800000) {
        return sign | (size > 0x7F800000 ? 0x7FFF : 0x7C00);
    }
    if (size >= 0x477FF000) {  // rounds to more than the largest
        return sign | 0x7C00;
    }
    if (size < 0x38800000) {  // in steps of 2^-24
        return sign | static_cast<unsigned>(nearbyintf(fabsf(x) * 16777216.0f));
    }
    const uint32_t rounded = size + 0xFFF + (size >> 13 & 1);
    return sign | (rounded - 0x38000000) >> 13;
}
inline float from_half(unsigned h) {
    const unsigned size = h & 0x7FFF;
    uint32_t u = size >= 0x7C00 ? 0x7F800000 | (size & 0x3FF) << 13 : (size << 13) + 0x38000000;
    float x;
    memcpy(&x, &u, 4);
    x = size < 0x400 ? static_cast<float>(size) * 0x1p-24f : x;
    return h & 0x8000 ? -x : x;
}
inline uint32_t to_halves(float a, float b) { return to_half(a) | to_half(b) << 16; }
inline void from_halves(uint32_t pair, float& a, float& b) { a = from_half(pair & 0xFFFF), b = from_half(pair >> 16); }
inline void copy_async(void* to, const void* from, bool wanted) {
    wanted ? memcpy(to, from, 16) : memset(to, 0, 16);
}
inline void copy_eight_async(void* to, const void* from) { memcpy(to, from, 8); }
inline void touch(void* to, const void* from) {
    memcpy(to, from, 4);
    emulation::touched_twice += !emulation::touched.insert(to).second;
}
inline uint4 load_once(const void* from) { return *static_cast<const uint4*>(from); }
inline void copies_end_group() {}
template <int kLeft>
inline void copies_wait() {}
inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

// d += a b of unsigned bytes a (signed if kSigned) and signed bytes b.
template <bool kSigned>
inline void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if (kSigned) {
        multiply_with(d, a, b, byte_product<int8_t, int8_t>);
    } else {
        multiply_with(d, a, b, byte_product<uint8_t, int8_t>);
    }
}
// The same, b unsigned and a unsigned.
inline void multiply_unsigned(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_with(d, a, b, byte_product<uint8_t, uint8_t>);
}

// `load_matrices` of transposed matrices of 16-bit elements.
inline void load_transposed(uint32_t (&to)[4], const void* row) {
    const Four out = emulation::together<const void*, Four>(row, [](const void* const* rows, Four* out) {
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 4; i++) {
                for (int half = 0; half < 2; half++) {
                    const char* const from = static_cast<const char*>(rows[8 * i + 2 * (lane % 4) + half]);
                    memcpy(reinterpret_cast<char*>(&out[lane].x[i]) + 2 * half, from + 2 * (lane / 4), 2);
                }
            }
        }
    });
    memcpy(to, out.x, sizeof out);
}
