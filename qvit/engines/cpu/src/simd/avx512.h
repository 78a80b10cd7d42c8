// Sixteen lanes: AVX-512 F, BW, DQ, VL and VNNI. Included by the translation unit of this instruction set alone.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace {

struct Avx512 {
    static constexpr int W = 16;
    using F = __m512;
    using I = __m512i;

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a * b + c
    static F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F to_half(F a) {  // the nearest float16
        return _mm512_cvtph_ps(_mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static F first(F a, int n) { return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1), a); }
    static F off_grid(F a) { return _mm512_reduce_ps(a, 0); }                         // a - round(a)
    static F max_abs(F a, F b) { return _mm512_range_ps(a, b, 0x0b); }                // the larger magnitude
    static F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }  // a * 2^n for whole n; underflows to 0
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    // The sums of four vectors.
    static void sum4(F a, F b, F c, F d, float* out) {
        const F ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
        const F cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
        const F abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
        const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
        _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
    }
    static float largest(F a) { return _mm512_reduce_max_ps(a); }

    static I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
    static void istore(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
    static I iset(int32_t x) { return _mm512_set1_epi32(x); }
    static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
    static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I imul(I a, I b) { return _mm512_mullo_epi32(a, b); }
    static I imax(I a, I b) { return _mm512_max_epi32(a, b); }
    static I imin(I a, I b) { return _mm512_min_epi32(a, b); }
    static I ior(I a, I b) { return _mm512_or_si512(a, b); }
    static I low_byte(I a) { return _mm512_and_si512(a, _mm512_set1_epi32(255)); }
    template <int N>
    static I left(I a) { return _mm512_slli_epi32(a, N); }
    using M = __mmask16;
    static M greater(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }
    static I half(I a) { return _mm512_srai_epi32(a, 1); }
    static M reaches(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
    static I pick(M m, I yes, I no) { return _mm512_mask_mov_epi32(no, m, yes); }
    static I add_where(M m, I a, I b) { return _mm512_mask_add_epi32(a, m, a, b); }
    static int32_t isum(I a) { return _mm512_reduce_add_epi32(a); }
    static int32_t ilargest(I a) { return _mm512_reduce_max_epi32(a); }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static I to_int(F a) { return _mm512_cvtps_epi32(a); }  // round half to even
    static F as_float(I a) { return _mm512_castsi512_ps(a); }
    static I as_int(F a) { return _mm512_castps_si512(a); }

    // The low bytes of the lanes, in order.
    static void store_bytes(uint8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
    static I load_bytes(const uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }

    // Words of four rows, transposed: word i of the rows goes to to + i * step, 16 bytes.
    static void store_transposed(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, int8_t* to,
                                 ptrdiff_t step) {
        const I x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b), z = _mm512_loadu_si512(c), w = _mm512_loadu_si512(d);
        const I xy0 = _mm512_unpacklo_epi32(x, y), xy1 = _mm512_unpackhi_epi32(x, y);
        const I zw0 = _mm512_unpacklo_epi32(z, w), zw1 = _mm512_unpackhi_epi32(z, w);
        const I words[4] = {_mm512_unpacklo_epi64(xy0, zw0), _mm512_unpackhi_epi64(xy0, zw0), _mm512_unpacklo_epi64(xy1, zw1),
                            _mm512_unpackhi_epi64(xy1, zw1)};
        for (int i = 0; i < 4; i++) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * step), _mm512_castsi512_si128(words[i]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (i + 4) * step), _mm512_extracti32x4_epi32(words[i], 1));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (i + 8) * step), _mm512_extracti32x4_epi32(words[i], 2));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (i + 12) * step), _mm512_extracti32x4_epi32(words[i], 3));
        }
    }

    // Per lane: acc + sum of the four products of the bytes of a (unsigned) and b (signed); exact for all bytes.
    // Written out, since GCC 12 copies, and spills, the accumulators of its intrinsic: twice the time of a whole product.
    template <bool kWide>
    static I dot4(I acc, I a, I b) {
        asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
        return acc;
    }
};

}  // namespace
