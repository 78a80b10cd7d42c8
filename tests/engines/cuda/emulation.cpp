// What all kernels of `emulation.h` have in common: fibers, and what the lanes of a warp do together.
#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <unordered_set>
#include <vector>

namespace emulation {

int current, threads;
long blocks;
unsigned char* shared;
Dim3 block, grid;

namespace {

constexpr int kStack = 256 * 1024;
constexpr int kMost = 64;  // bytes that a lane gives, or gets

// A thread of one block after the other.
struct Fiber {
    ucontext_t context;
    jmp_buf at;
    bool started = false, done = false;
    std::unique_ptr<char[]> stack{new char[kStack]};  // memory that is touched is all that it takes
};

struct Four {
    uint32_t x[4];
};

struct Warp {
    int arrived = 0;
    long turn = 0;
    alignas(16) unsigned char in[32 * kMost], out[32 * kMost];
};

std::deque<Fiber> fibers;  // they stay where they are
std::vector<Warp> warps;
jmp_buf scheduler;
int waiting;
long barrier_turn, touched_twice;
std::unordered_set<const void*> touched;  // places of a block's touches
void (*body)(const void*);
const void* arguments;

void entry() {
    for (;;) {
        body(arguments);
        fibers[current].done = true;
        yield();
    }
}

// All lanes of a warp give `in`; when the last one has, `work(in, out)` fills all of `out`.
template <class In, class Out, class Work>
Out together(const In& in, const Work& work) {
    static_assert(sizeof(In) <= kMost && sizeof(Out) <= kMost);
    Warp& warp = warps[current / 32];
    const int lane = current % 32;
    memcpy(warp.in + lane * sizeof in, &in, sizeof in);
    const long turn = warp.turn;
    if (++warp.arrived == 32) {
        In all[32];
        Out results[32];
        memcpy(all, warp.in, sizeof all);
        work(all, results);
        memcpy(warp.out, results, sizeof results);
        warp.arrived = 0;
        warp.turn++;
    }
    while (warp.turn == turn) {
        yield();
    }
    Out out;
    memcpy(&out, warp.out + lane * sizeof out, sizeof out);
    return out;
}

void run_block() {
    for (int i = 0; i < threads; i++) {
        fibers[i].done = false;
    }
    touched.clear();
    blocks++;
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
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = kStack;
            fiber.context.uc_link = nullptr;
            makecontext(&fiber.context, entry, 0);
            setcontext(&fiber.context);
        }
    }
}

// float16 and back.
unsigned to_half(float x) {
    const uint32_t u = static_cast<uint32_t>(__float_as_int(x));
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
float from_half(unsigned h) {
    const unsigned size = h & 0x7FFF;
    const uint32_t u = size >= 0x7C00 ? 0x7F800000 | (size & 0x3FF) << 13 : (size << 13) + 0x38000000;
    const float x = size < 0x400 ? static_cast<float>(size) * 0x1p-24f : __int_as_float(static_cast<int>(u));
    return h & 0x8000 ? -x : x;
}

}  // namespace

void yield() {
    if (!_setjmp(fibers[current].at)) {
        _longjmp(scheduler, 1);
    }
}

void barrier() {
    const long turn = barrier_turn;
    if (++waiting == threads) {
        waiting = 0;
        barrier_turn++;
    }
    while (barrier_turn == turn) {
        yield();
    }
}

void warp_barrier() {
    together<int, int>(0, [](const int*, int* out) { memset(out, 0, 32 * sizeof *out); });
}

uint64_t of_lane(uint64_t value, int lane) {
    struct In {
        uint64_t value;
        int lane;
    };
    return together<In, uint64_t>({value, lane}, [](const In* in, uint64_t* out) {
        for (int i = 0; i < 32; i++) {
            out[i] = in[in[i].lane].value;
        }
    });
}

Quad of_quad(const uint32_t (&own)[4]) {
    return together<Four, Quad>({own[0], own[1], own[2], own[3]}, [](const Four* in, Quad* out) {
        for (int i = 0; i < 32; i++) {
            memcpy(out[i].words, in + i / 4 * 4, sizeof out[i].words);
        }
    });
}

unsigned ballot(bool predicate) {
    return together<bool, unsigned>(predicate, [](const bool* in, unsigned* out) {
        unsigned bits = 0;
        for (int i = 0; i < 32; i++) {
            bits |= static_cast<unsigned>(in[i]) << i;
        }
        for (int i = 0; i < 32; i++) {
            out[i] = bits;
        }
    });
}

void launch(void (*kernel)(const void*), const void* args, int gx, int gy, int gz, int count, int bytes) {
    threads = count;
    while (static_cast<int>(fibers.size()) < count) {
        fibers.emplace_back();
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
extern "C" long emulated_touched_twice() { return touched_twice; }

}  // namespace emulation

using emulation::Four;
using emulation::together;

namespace {

struct Operands {
    uint32_t a[4], b[2];
};

template <class A, class B>
void multiply_with(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Operands in;
    memcpy(in.a, a, sizeof a);
    memcpy(in.b, b, sizeof b);
    const Four out = together<Operands, Four>(in, [](const Operands* in, Four* out) {
        A left[16][32];  // bytes of rows and of columns
        B right[8][32];
        for (int lane = 0; lane < 32; lane++) {
            const int g = lane / 4, t = 4 * (lane % 4);
            for (int half = 0; half < 2; half++) {
                memcpy(&left[g][16 * half + t], &in[lane].a[2 * half], 4);
                memcpy(&left[g + 8][16 * half + t], &in[lane].a[2 * half + 1], 4);
                memcpy(&right[g][16 * half + t], &in[lane].b[half], 4);
            }
        }
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 4; i++) {
                const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                int sum = 0;
                for (int k = 0; k < 32; k++) {
                    sum += left[row][k] * right[column][k];
                }
                out[lane].x[i] = static_cast<uint32_t>(sum);
            }
        }
    });
    for (int i = 0; i < 4; i++) {
        d[i] += static_cast<int>(out.x[i]);
    }
}

}  // namespace

void load_matrices(uint32_t (&to)[4], const void* row) {
    const Four out = together<const void*, Four>(row, [](const void* const* rows, Four* out) {
        for (int lane = 0; lane < 32; lane++) {
            for (int i = 0; i < 4; i++) {
                memcpy(&out[lane].x[i], static_cast<const char*>(rows[8 * i + lane / 4]) + 4 * (lane % 4), 4);
            }
        }
    });
    memcpy(to, out.x, sizeof out);
}

void load_transposed(uint32_t (&to)[4], const void* row) {
    const Four out = together<const void*, Four>(row, [](const void* const* rows, Four* out) {
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

template <bool kSigned>
void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if (kSigned) {
        multiply_with<int8_t, int8_t>(d, a, b);
    } else {
        multiply_with<uint8_t, int8_t>(d, a, b);
    }
}
template void multiply<true>(int (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);
template void multiply<false>(int (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]);

void multiply_unsigned(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    multiply_with<uint8_t, uint8_t>(d, a, b);
}

uint32_t to_halves(float a, float b) { return emulation::to_half(a) | emulation::to_half(b) << 16; }
void from_halves(uint32_t pair, float& a, float& b) {
    a = emulation::from_half(pair & 0xFFFF), b = emulation::from_half(pair >> 16);
}

void touch(void* to, const void* from) {
    memcpy(to, from, 4);
    emulation::touched_twice += !emulation::touched.insert(to).second;
}
