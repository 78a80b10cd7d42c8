// Expansion of packed streams with 512-bit shifts and masks, for the files compiled for AVX-512. Internal linkage throughout:
// nothing compiled for these instructions may be merged with a copy of another file.
#pragma once

#include <immintrin.h>

#include "packed_codes.h"

namespace qvit::cpu {

// sum + dot products of groups of 4: the instruction itself, since GCC copies the sums of _mm512_dpbusd_epi32 around.
static inline void dot(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// Keeps a loaded vector in its register where the compiler would load it again at each use.
static inline void hold(__m512i& vector) { asm("" : "+v"(vector)); }

// Packed stream of `count` fields -> one byte a field minus `offset`, expanded_bytes(count, bits) bytes; out 64-byte aligned.
template <int bits>
static inline void expand_fields(const uint8_t* packed, size_t count, int offset, uint8_t* out) {
    const __m512i mask = _mm512_set1_epi8((1 << bits) - 1), bias = _mm512_set1_epi8(static_cast<char>(offset));
    auto put = [&](int n, __m512i field) { _mm512_store_si512(out + 64 * n, _mm512_sub_epi8(field, bias)); };
    const uint8_t* end = out + expanded_bytes(count, bits);
    for (; out != end; out += block_fields(bits), packed += block_bytes(bits)) {
        const __m512i v0 = _mm512_loadu_si512(packed);
        if constexpr (bits == 4 || bits == 2) {
            put(0, _mm512_and_si512(v0, mask));
            put(1, _mm512_and_si512(_mm512_srli_epi16(v0, bits), mask));
            if constexpr (bits == 2) {
                put(2, _mm512_and_si512(_mm512_srli_epi16(v0, 4), mask));
                put(3, _mm512_and_si512(_mm512_srli_epi16(v0, 6), mask));
            }
        } else {
            const __m512i v1 = _mm512_loadu_si512(packed + 64), v2 = _mm512_loadu_si512(packed + 128);
            const __m512i two = _mm512_set1_epi8(3), four = _mm512_set1_epi8(4);
            // The two top bits of each vector, brought down to bits 0 and 1.
            const __m512i t0 = _mm512_and_si512(_mm512_srli_epi16(v0, 6), two), t1 = _mm512_and_si512(_mm512_srli_epi16(v1, 6), two);
            if constexpr (bits == 6) {
                const __m512i t2 = _mm512_and_si512(_mm512_srli_epi16(v2, 6), two);
                put(0, _mm512_and_si512(v0, mask));
                put(1, _mm512_and_si512(v1, mask));
                put(2, _mm512_and_si512(v2, mask));
                put(3, _mm512_or_si512(t0, _mm512_or_si512(_mm512_slli_epi16(t1, 2), _mm512_slli_epi16(t2, 4))));
            } else {
                const __m512i v[3] = {v0, v1, v2};
                for (int i = 0; i < 3; ++i) {
                    put(2 * i, _mm512_and_si512(v[i], mask));
                    put(2 * i + 1, _mm512_and_si512(_mm512_srli_epi16(v[i], 3), mask));
                }
                put(6, _mm512_or_si512(t0, _mm512_and_si512(_mm512_srli_epi16(v2, 4), four)));
                put(7, _mm512_or_si512(t1, _mm512_and_si512(_mm512_srli_epi16(v2, 5), four)));
            }
        }
    }
}

// Copies the header, expands the stream: panel of `fields` fields behind `head` bytes -> scratch.
static inline void expand_panel(const uint8_t* panel, size_t head, size_t fields, int bits, int offset, uint8_t* scratch) {
    for (size_t i = 0; i < head; i += 64) _mm512_store_si512(scratch + i, _mm512_loadu_si512(panel + i));
    if (bits == 2) expand_fields<2>(panel + head, fields, offset, scratch + head);
    if (bits == 3) expand_fields<3>(panel + head, fields, offset, scratch + head);
    if (bits == 4) expand_fields<4>(panel + head, fields, offset, scratch + head);
    if (bits == 6) expand_fields<6>(panel + head, fields, offset, scratch + head);
}

}  // namespace qvit::cpu
