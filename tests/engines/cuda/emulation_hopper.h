// What `hopper.cuh` and `attention_ring.cuh` have in PTX, on the CPU: barriers that count bytes, bulk copies, wgmma.
#pragma once

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
inline int of_first_lane(int x) { return __shfl_sync(kAll, x, 0); }
inline void copy_tile(void* to, const void* from, int bytes, Barrier* b) {
    memcpy(to, from, bytes);
    b->phase_and_bytes -= 2 * bytes;
    barrier_turn_if_done(b);
}

typedef const unsigned char* Operand;
inline Operand operand(const void* tile) { return static_cast<Operand>(tile); }
inline Operand advance(Operand o, int bytes) { return o + bytes; }
// Byte k of row r of an operand: the swizzle is a matter of addresses.
inline unsigned char byte_of(Operand o, int row, int k) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(o) + row / 8 * 1024 + row % 8 * 128 + k;
    return *reinterpret_cast<const unsigned char*>(at ^ (at >> 7 & 7) << 4);
}
template <int kCount>
inline void registers_up() {}
template <int kCount>
inline void registers_down() {}
template <int N>
inline void settle(int (&)[N]) {}
inline void settle(uint32_t&, uint32_t&) {}
inline void products_begin() {}

// Operands of a thread's products under way, group by group: what is in its registers stays until it has been waited for.
struct Held {
    const uint32_t* at;
    uint32_t words[4];
};
inline std::vector<std::vector<std::vector<Held>>> held_groups;
inline std::vector<std::vector<Held>>& held() {
    if (static_cast<int>(held_groups.size()) < emulation::threads) {
        held_groups.resize(emulation::threads);
    }
    auto& groups = held_groups[emulation::current];
    if (groups.empty()) {
        groups.emplace_back();
    }
    return groups;
}
inline void products_end_group() { held().emplace_back(); }
template <int kLeft>
inline void products_wait() {
    auto& groups = held();
    for (const auto& group : groups) {  // none has been touched so far
        for (const Held& one : group) {
            if (memcmp(one.at, one.words, sizeof one.words) != 0) {
                fprintf(stderr, "registers of a product under way have been changed\n");
                abort();
            }
        }
    }
    while (static_cast<int>(groups.size()) > kLeft + 1) {
        groups.erase(groups.begin());
    }
}

template <int N, class Product>
inline void emulate_product(int (&d)[N / 2], Operand a, Operand b, bool add, const Product& product) {
    const int lane = emulation::current % 32, warp = emulation::current / 32 % 4;
    for (int i = 0; i < N / 2; i++) {
        const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        int sum = add ? d[i] : 0;
        for (int k = 0; k < 32; k++) {
            sum += product(byte_of(a, row, k), byte_of(b, column, k));
        }
        d[i] = sum;
    }
}
template <int N, bool kSigned>
inline void warpgroup_multiply(int (&d)[N / 2], Operand a, Operand b, bool add) {
    emulate_product<N>(d, a, b, add, [](unsigned char x, unsigned char y) {
        return (kSigned ? static_cast<int>(static_cast<int8_t>(x)) : static_cast<int>(x)) * static_cast<int8_t>(y);
    });
}
// a is in registers: each lane of a quad has two words of two rows, which the others need, too.
template <int N, class Product>
inline void emulate_held_product(int (&d)[N / 2], const uint32_t (&a)[4], Operand b, bool add, const Product& product) {
    Four own;
    memcpy(own.x, a, sizeof own);
    held().back().push_back({a, {a[0], a[1], a[2], a[3]}});
    const int lane = emulation::current % 32;
    uint32_t words[2][8];  // of both rows
    for (int t = 0; t < 4; t++) {
        const Four other = emulation::together<Four, Four>(own, [&](const Four* in, Four* out) {
            for (int i = 0; i < 32; i++) {
                out[i] = in[i / 4 * 4 + t];
            }
        });
        for (int i = 0; i < 4; i++) {
            words[i % 2][4 * (i / 2) + t] = other.x[i];
        }
    }
    for (int i = 0; i < N / 2; i++) {
        const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
        int sum = add ? d[i] : 0;
        for (int k = 0; k < 32; k++) {
            sum += product(static_cast<uint8_t>(words[i / 2 % 2][k / 4] >> (8 * (k % 4))), byte_of(b, column, k));
        }
        d[i] = sum;
    }
}
template <int N>
inline void warpgroup_multiply_held(int (&d)[N / 2], const uint32_t (&a)[4], Operand b, bool add) {
    emulate_held_product<N>(d, a, b, add, [](unsigned char x, unsigned char y) { return x * static_cast<int8_t>(y); });
}
template <int N>
inline void warpgroup_multiply_bits_held(int (&d)[N / 2], const uint32_t (&a)[4], Operand b, bool add) {
    emulate_held_product<N>(d, a, b, add, [](unsigned char x, unsigned char y) { return __builtin_popcount(x & y); });
}
template <int N>
inline void warpgroup_multiply_bits(int (&d)[N / 2], Operand a, Operand b, bool add) {
    emulate_product<N>(d, a, b, add, [](unsigned char x, unsigned char y) { return __builtin_popcount(x & y); });
}

inline int take_shared(int* to) { return (*to)++; }
inline void proxies_meet() {}
