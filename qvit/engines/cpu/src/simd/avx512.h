// Sixteen lanes: AVX-512 F, BW, DQ, VL and VNNI. Included by the translation unit of this instruction set alone.
#pragma once

#include <immintrin.h>

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
    static F first(F a, int n) { return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1), a); }
    static F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }  // a * 2^n for whole n; underflows to 0
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    static float largest(F a) { return _mm512_reduce_max_ps(a); }

    static I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
    static void istore(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
    static I iset(int32_t x) { return _mm512_set1_epi32(x); }
    static I iadd(I a, I b) { return _mm512_add_epi32(a, b); }
    static I isub(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I imax(I a, I b) { return _mm512_max_epi32(a, b); }
    static I imin(I a, I b) { return _mm512_min_epi32(a, b); }
    static I ior(I a, I b) { return _mm512_or_si512(a, b); }
    static I low_byte(I a) { return _mm512_and_si512(a, _mm512_set1_epi32(255)); }
    template <int N>
    static I left(I a) { return _mm512_slli_epi32(a, N); }
    // 1 where the code passes the threshold, added to `count`.
    static I count_greater(I count, I a, I threshold) {
        return _mm512_mask_sub_epi32(count, _mm512_cmpgt_epi32_mask(a, threshold), count, _mm512_set1_epi32(-1));
    }
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

    // Per lane: acc + sum of the four products of the bytes of a (unsigned) and b (signed); exact for all bytes.
    template <bool kWide>
    static I dot4(I acc, I a, I b) { return _mm512_dpbusd_epi32(acc, a, b); }
};

}  // namespace
