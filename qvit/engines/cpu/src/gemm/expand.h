// Expansion of packed panels with shifts and masks, for any vector width. `Bytes` wraps a vector of bytes: `size`, `Vector`,
// load, store, fill (one byte everywhere), both (and), either (or), minus, down<n> and up<n> (shifts of words or bytes). All of
// it has internal linkage, so that no file runs a copy compiled for another's instructions.
#pragma once

#include "packed_codes.h"

namespace qvit::cpu {
namespace {

// Packed stream of `count` fields -> expanded_bytes(count, bits) bytes, each a field minus `offset`. out: 64-byte aligned.
template <class Bytes, int bits>
inline void expand_fields(const uint8_t* packed, size_t count, int offset, uint8_t* out) {
    using V = typename Bytes::Vector;
    const V mask = Bytes::fill((1 << bits) - 1), two = Bytes::fill(3), four = Bytes::fill(4), bias = Bytes::fill(offset);
    const uint8_t* end = out + expanded_bytes(count, bits);
    for (; out != end; out += block_fields(bits), packed += block_bytes(bits))
        for (int j = 0; j < 64; j += Bytes::size) {
            auto put = [&](int n, V field) { Bytes::store(out + 64 * n + j, Bytes::minus(field, bias)); };
            const V v0 = Bytes::load(packed + j);
            if constexpr (bits == 4 || bits == 2) {
                put(0, Bytes::both(v0, mask));
                put(1, Bytes::both(Bytes::template down<bits>(v0), mask));
                if constexpr (bits == 2) {
                    put(2, Bytes::both(Bytes::template down<4>(v0), mask));
                    put(3, Bytes::both(Bytes::template down<6>(v0), mask));
                }
            } else {
                const V v1 = Bytes::load(packed + 64 + j), v2 = Bytes::load(packed + 128 + j);
                // The two top bits of a vector, brought down to bits 0 and 1.
                const V top0 = Bytes::both(Bytes::template down<6>(v0), two),
                        top1 = Bytes::both(Bytes::template down<6>(v1), two);
                put(0, Bytes::both(v0, mask));
                if constexpr (bits == 6) {
                    const V top2 = Bytes::both(Bytes::template down<6>(v2), two);
                    put(1, Bytes::both(v1, mask));
                    put(2, Bytes::both(v2, mask));
                    put(3, Bytes::either(top0, Bytes::either(Bytes::template up<2>(top1), Bytes::template up<4>(top2))));
                } else {
                    put(1, Bytes::both(Bytes::template down<3>(v0), mask));
                    put(2, Bytes::both(v1, mask));
                    put(3, Bytes::both(Bytes::template down<3>(v1), mask));
                    put(4, Bytes::both(v2, mask));
                    put(5, Bytes::both(Bytes::template down<3>(v2), mask));
                    put(6, Bytes::either(top0, Bytes::both(Bytes::template down<4>(v2), four)));
                    put(7, Bytes::either(top1, Bytes::both(Bytes::template down<5>(v2), four)));
                }
            }
        }
}

// A packed panel with `head` bytes in front of its `fields` fields -> the same, expanded.
template <class Bytes>
inline void expand_panel(const uint8_t* panel, size_t head, size_t fields, int bits, int offset, uint8_t* scratch) {
    for (size_t i = 0; i < head; i += Bytes::size) Bytes::store(scratch + i, Bytes::load(panel + i));
    if (bits == 2) expand_fields<Bytes, 2>(panel + head, fields, offset, scratch + head);
    if (bits == 3) expand_fields<Bytes, 3>(panel + head, fields, offset, scratch + head);
    if (bits == 4) expand_fields<Bytes, 4>(panel + head, fields, offset, scratch + head);
    if (bits == 6) expand_fields<Bytes, 6>(panel + head, fields, offset, scratch + head);
}

}  // namespace
}  // namespace qvit::cpu
