// How weight panels lie in memory, common to all kernels.
//
// A panel is a header of 64 bytes (int32 width, see panel_width; the rest zero), then `terms` int32 a channel (0 or 1, rounded
// up to 64 bytes), then the stream of codes in the kernel's order, packed. Unpacked it is the same with the stream expanded to
// a byte a code, so that a kernel can read 8-bit weights where they are.
//
// The packed stream is blocks of 64-byte vectors that expand with shifts and masks alone, whatever the vector width. Codes are
// stored biased, code + 2^(bits-1), as unsigned fields of exactly `bits` bits; 8-bit codes as they are. With v_i the byte j of
// a block's vector i and c_n the block's field n * 64 + j:
//
//     8 bits, 1 vector:  v_0 = c_0
//     4 bits, 1 vector:  v_0 = c_0 | c_1 << 4
//     2 bits, 1 vector:  v_0 = c_0 | c_1 << 2 | c_2 << 4 | c_3 << 6
//     6 bits, 3 vectors: v_i = c_i | (c_3 >> 2 i & 3) << 6
//     3 bits, 3 vectors: v_i = c_2i | c_2i+1 << 3 | t_i << 6,  t_0 = c_6 & 3,  t_1 = c_7 & 3,  t_2 = c_6 >> 2 | c_7 >> 2 << 1
#pragma once

#include "gemm.h"

namespace qvit::cpu {

static constexpr size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

static constexpr size_t block_fields(int bits) { return bits == 8 ? 64 : bits == 4 ? 128 : bits == 3 ? 512 : 256; }
static constexpr size_t block_bytes(int bits) { return bits == 3 || bits == 6 ? 192 : 64; }

// Bytes of a stream of `fields` fields, packed and expanded: whole blocks.
static constexpr size_t packed_bytes(size_t fields, int bits) {
    return round_up(fields, block_fields(bits)) / block_fields(bits) * block_bytes(bits);
}
static constexpr size_t expanded_bytes(size_t fields, int bits) { return round_up(fields, block_fields(bits)); }

void pack_stream(const uint8_t* fields, size_t count, int bits, uint8_t* packed);
void expand_stream(const uint8_t* packed, size_t count, int bits, uint8_t* fields);  // portable, writes expanded_bytes

static constexpr size_t header_bytes(int width, int terms) { return 64 + round_up(static_cast<size_t>(width) * terms * 4, 64); }

// Channels of the panel whose first channel is `first`: the last panel is as narrow as steps of `step` channels allow.
static constexpr int panel_width(int M, int panel, int step, int first) {
    return M - first >= panel ? panel : static_cast<int>(round_up(static_cast<size_t>(M - first), static_cast<size_t>(step)));
}

// The order of a kernel's stream.
struct StreamOrder {
    int panel, step;        // channels a panel, and see panel_width
    int terms;              // int32 terms a channel, 0 or 1
    int (*bits)(int bits);  // bits of a field, for weights of `bits` bits
    size_t (*fields)(int width, int K);
    // Writes the fields and terms of the channels from `first` on; both are zeroed before.
    void (*fill)(const int8_t* codes, int M, int K, int bits, int first, int width, uint8_t* fields, int32_t* terms);
};

PackedWeight pack_panels(const StreamOrder& order, const int8_t* codes, int M, int K, int bits);

// Orders that several kernels share. Groups of 4 consecutive k, a channel's 4 bytes together: [K / 4][width][4]. With terms: K
// is rounded up to 8 and a channel's term is the sum over pairs of groups of the products of their biased codes
// (gemm_avx512pairs.cpp says why).
extern const StreamOrder quad_order, quad_pair_order;

}  // namespace qvit::cpu
