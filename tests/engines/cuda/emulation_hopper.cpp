// What all kernels of `emulation_hopper.h` have in common: a warpgroup's products.
#include "emulation_hopper.h"

#include <stdio.h>

#include <deque>
#include <vector>

namespace {

struct Held {
    const uint32_t* at;
    uint32_t words[4];
};
// A thread's products under way, group by group, and the block that it is of.
struct UnderWay {
    long block = 0;
    std::deque<std::vector<Held>> groups{1};
};
std::vector<UnderWay> all_under_way;

std::deque<std::vector<Held>>& under_way() {
    if (static_cast<int>(all_under_way.size()) < emulation::threads) {
        all_under_way.resize(emulation::threads);
    }
    UnderWay& own = all_under_way[emulation::current];
    if (own.block != emulation::blocks) {
        own = {emulation::blocks};
    }
    return own.groups;
}

struct Row {
    unsigned char bytes[32];
};
// 32 bytes of row r of an operand: the swizzle is a matter of addresses.
Row row_of(Operand o, int r) {
    Row row;
    for (int k = 0; k < 32; k += 16) {
        const uintptr_t at = reinterpret_cast<uintptr_t>(o) + r / 8 * 1024 + r % 8 * 128 + k;
        memcpy(row.bytes + k, reinterpret_cast<const unsigned char*>(at ^ (at >> 7 & 7) << 4), 16);
    }
    return row;
}

template <class A>
struct Bytes {
    static int product(const Row& a, const Row& b) {
        int sum = 0;
        for (int k = 0; k < 32; k++) {
            sum += static_cast<A>(a.bytes[k]) * static_cast<int8_t>(b.bytes[k]);
        }
        return sum;
    }
};
struct Bits {
    static int product(const Row& a, const Row& b) {
        int sum = 0;
        for (int k = 0; k < 32; k += 8) {
            uint64_t x, y;
            memcpy(&x, a.bytes + k, 8);
            memcpy(&y, b.bytes + k, 8);
            sum += __builtin_popcountll(x & y);
        }
        return sum;
    }
};

// A thread's sums of its two rows.
template <class Kind>
void multiply_rows(int* d, int n, const Row (&rows)[2], Operand b, bool add) {
    const int lane = emulation::current % 32;
    for (int j = 0; j < n / 8; j++) {
        for (int i = 0; i < 2; i++) {
            const Row column = row_of(b, 8 * j + 2 * (lane % 4) + i);
            for (int half = 0; half < 2; half++) {
                int& sum = d[4 * j + 2 * half + i];
                sum = (add ? sum : 0) + Kind::product(rows[half], column);
            }
        }
    }
}

template <class Kind>
void multiply_shared(int* d, int n, Operand a, Operand b, bool add) {
    const int row = emulation::current / 32 % 4 * 16 + emulation::current % 32 / 4;
    multiply_rows<Kind>(d, n, {row_of(a, row), row_of(a, row + 8)}, b, add);
}

template <class Kind>
void multiply_held(int* d, int n, const uint32_t (&a)[4], Operand b, bool add) {
    under_way().back().push_back({a, {a[0], a[1], a[2], a[3]}});
    const emulation::Quad quad = emulation::of_quad(a);
    Row rows[2];
    for (int t = 0; t < 4; t++) {
        for (int i = 0; i < 4; i++) {
            memcpy(rows[i % 2].bytes + 4 * (4 * (i / 2) + t), &quad.words[t][i], 4);
        }
    }
    multiply_rows<Kind>(d, n, rows, b, add);
}

}  // namespace

void products_end_group() { under_way().emplace_back(); }

void products_wait_for(int left) {
    auto& groups = under_way();
    for (const auto& group : groups) {  // none has been touched so far
        for (const Held& one : group) {
            if (memcmp(one.at, one.words, sizeof one.words) != 0) {
                fprintf(stderr, "registers of a product under way have been changed\n");
                abort();
            }
        }
    }
    while (static_cast<int>(groups.size()) > left + 1) {
        groups.pop_front();
    }
}

void warpgroup_product_signed(int* d, int n, Operand a, Operand b, bool add) {
    multiply_shared<Bytes<int8_t>>(d, n, a, b, add);
}
void warpgroup_product_unsigned(int* d, int n, Operand a, Operand b, bool add) {
    multiply_shared<Bytes<uint8_t>>(d, n, a, b, add);
}
void warpgroup_product_bits(int* d, int n, Operand a, Operand b, bool add) { multiply_shared<Bits>(d, n, a, b, add); }
void warpgroup_product_held(int* d, int n, const uint32_t (&a)[4], Operand b, bool add) {
    multiply_held<Bytes<uint8_t>>(d, n, a, b, add);
}
void warpgroup_product_bits_held(int* d, int n, const uint32_t (&a)[4], Operand b, bool add) {
    multiply_held<Bits>(d, n, a, b, add);
}
