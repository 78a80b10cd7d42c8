// What the files compiled for AVX-512 share.
#pragma once

#include <immintrin.h>

#include "expand.h"

namespace qvit::cpu {
namespace {  // in a header: each file keeps a copy compiled for its own instructions

struct Bytes512 {
    using Vector = __m512i;
    static constexpr int size = 64;
    static Vector load(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static void store(uint8_t* p, Vector v) { _mm512_store_si512(p, v); }
    static Vector fill(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
    static Vector both(Vector a, Vector b) { return _mm512_and_si512(a, b); }
    static Vector either(Vector a, Vector b) { return _mm512_or_si512(a, b); }
    static Vector minus(Vector a, Vector b) { return _mm512_sub_epi8(a, b); }
    template <int n>
    static Vector down(Vector a) {
        return _mm512_srli_epi16(a, n);
    }
    template <int n>
    static Vector up(Vector a) {
        return _mm512_slli_epi16(a, n);
    }
};

// sum + dot products of groups of 4: the instruction itself, since GCC copies the sums of _mm512_dpbusd_epi32 around.
inline void dot(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(unsigned_bytes), "v"(signed_bytes));
}

// Keeps a loaded vector in its register where the compiler would load it again at each use.
inline void hold(__m512i& vector) { asm("" : "+v"(vector)); }

}  // namespace
}  // namespace qvit::cpu
