// What the kernels of dot products share: plain activation codes, and weights in groups of 4 expanded to signed bytes.
#pragma once

#include "expand.h"

namespace qvit::cpu {
namespace {

template <class Bytes>
struct QuadLayout {
    static size_t row_bytes(int K) { return round_up(static_cast<size_t>(K), 64); }

    static PackedWeight pack(const int8_t* codes, int M, int K, int bits) { return pack_panels(quad_order, codes, M, K, bits); }

    static size_t fields(const PackedWeight& weight, int p) {
        return quad_order.fields(panel_width(weight.M, weight.panel, quad_order.step, p * weight.panel), weight.K);
    }

    static size_t scratch_bytes(int K) { return 64 + expanded_bytes(quad_order.fields(quad_order.panel, K), 3); }

    static const uint8_t* unpack(const PackedWeight& weight, int p, uint8_t* scratch) {
        const uint8_t* panel = weight.data.get() + weight.panel_bytes * static_cast<size_t>(p);
        if (weight.bits == 8) return panel;
        expand_panel<Bytes>(panel, 64, fields(weight, p), weight.bits, 1 << (weight.bits - 1), scratch);
        return scratch;
    }

    // max_rows: rows at a time. sums: see GemmKernel.
    static constexpr GemmKernel kernel(const char* name, Isa isa, int max_rows, decltype(GemmKernel::sums) sums) {
        return {name, isa, 64, max_rows, row_bytes, nullptr, pack, scratch_bytes, unpack, sums};
    }
};

}  // namespace
}  // namespace qvit::cpu
