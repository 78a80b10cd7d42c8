// What `hopper.cuh` and `attention_ring.cuh` have in PTX, on the CPU: barriers that count bytes, bulk copies, wgmma.
#pragma once

#include "emulation.h"

// Counts arrivals and bytes of one phase after the other.
struct alignas(8) Barrier {
    int16_t count, arrived;
    int phase_and_bytes;  // phase in the last bit, bytes that are awaited above
};

inline void barrier_init(Barrier* b, int count) { *b = {static_cast<int16_t>(count), 0, 0}; }
inline void barriers_ready() {}
inline void barrier_turn_if_done(Barrier* b) {
    if (b->arrived == b->count && b->phase_and_bytes < 2 && b->phase_and_bytes >= 0) {
        b->arrived = 0;
        b->phase_and_bytes ^= 1;
    }
}
inline void barrier_arrive(Barrier* b) {
    b->arrived++;
    barrier_turn_if_done(b);
}
inline void barrier_expect(Barrier* b, int bytes) {
    b->phase_and_bytes += 2 * bytes;
    barrier_arrive(b);
}
inline void barrier_wait(Barrier* b, int phase) {
    while ((b->phase_and_bytes & 1) == phase) {
        emulation::yield();
    }
}
inline void prefetch(const void*, int) {}
inline int of_first_lane(int x) { return emulation::shuffled(x, 0); }
inline void copy_tile(void* to, const void* from, int bytes, Barrier* b) {
    memcpy(to, from, bytes);
    b->phase_and_bytes -= 2 * bytes;
    barrier_turn_if_done(b);
}

typedef const unsigned char* Operand;
inline Operand operand(const void* tile) { return static_cast<Operand>(tile); }
inline Operand advance(Operand o, int bytes) { return o + bytes; }
template <int kCount>
inline void registers_up() {}
template <int kCount>
inline void registers_down() {}
template <int N>
inline void settle(int (&)[N]) {}
inline void settle(uint32_t&, uint32_t&) {}
inline void products_begin() {}

// What is in registers of products under way may not be changed before it has been waited for.
void products_end_group();
void products_wait_for(int left);
template <int kLeft>
void products_wait() {
    products_wait_for(kLeft);
}

// d[N / 2] += a b of n columns.
void warpgroup_product_signed(int* d, int n, Operand a, Operand b, bool add);
void warpgroup_product_unsigned(int* d, int n, Operand a, Operand b, bool add);
void warpgroup_product_bits(int* d, int n, Operand a, Operand b, bool add);
// a is in registers: each lane of a quad has two words of two rows.
void warpgroup_product_held(int* d, int n, const uint32_t (&a)[4], Operand b, bool add);
void warpgroup_product_bits_held(int* d, int n, const uint32_t (&a)[4], Operand b, bool add);

template <int N, bool kSigned>
void warpgroup_multiply(int (&d)[N / 2], Operand a, Operand b, bool add) {
    kSigned ? warpgroup_product_signed(d, N, a, b, add) : warpgroup_product_unsigned(d, N, a, b, add);
}
template <int N>
void warpgroup_multiply_bits(int (&d)[N / 2], Operand a, Operand b, bool add) {
    warpgroup_product_bits(d, N, a, b, add);
}
template <int N>
void warpgroup_multiply_held(int (&d)[N / 2], const uint32_t (&a)[4], Operand b, bool add) {
    warpgroup_product_held(d, N, a, b, add);
}
template <int N>
void warpgroup_multiply_bits_held(int (&d)[N / 2], const uint32_t (&a)[4], Operand b, bool add) {
    warpgroup_product_bits_held(d, N, a, b, add);
}

inline int take_shared(int* to) { return (*to)++; }
inline void proxies_meet() {}
