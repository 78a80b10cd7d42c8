// What the files compiled for AVX2 share.
#pragma once

#include <immintrin.h>

#include "expand.h"

namespace qvit::cpu {
namespace {  // in a header: each file keeps a copy compiled for its own instructions

struct Bytes256 {
    using Vector = __m256i;
    static constexpr int size = 32;
    static Vector load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const Vector*>(p)); }
    static void store(uint8_t* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<Vector*>(p), v); }
    static Vector fill(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
    static Vector both(Vector a, Vector b) { return _mm256_and_si256(a, b); }
    static Vector either(Vector a, Vector b) { return _mm256_or_si256(a, b); }
    static Vector minus(Vector a, Vector b) { return _mm256_sub_epi8(a, b); }
    template <int n>
    static Vector down(Vector a) {
        return _mm256_srli_epi16(a, n);
    }
    template <int n>
    static Vector up(Vector a) {
        return _mm256_slli_epi16(a, n);
    }
};

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// Four codes, everywhere.
inline __m256i group(const uint8_t* a) {
    int codes;
    __builtin_memcpy(&codes, a, 4);
    return _mm256_set1_epi32(codes);
}

}  // namespace
}  // namespace qvit::cpu
