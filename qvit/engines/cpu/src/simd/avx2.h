// Eight lanes: AVX2, FMA and F16C, with AVX-VNNI's byte products where the file is compiled for it.
#pragma once

#include <immintrin.h>
#include <string.h>

#include <cstddef>
#include <cstdint>

namespace {

struct Avx2 {
    static constexpr int W = 8;
    using F = __m256;
    using I = __m256i;

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static F set(float x) { return _mm256_set1_ps(x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
    static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static F to_half(F a) {  // the nearest float16
        return _mm256_cvtph_ps(_mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static F first(F a, int n) {
        const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        return _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane)));
    }
    static F off_grid(F a) { return sub(a, round(a)); }       // a - round(a)
    static F max_abs(F a, F b) { return max(abs(a), abs(b)); }  // the larger magnitude
    static F scale2(F a, F n) {
        // Below 2^-126 the factor is 2^-127 with a zero exponent field, that is, 0.
        const I e = to_int(max(n, set(-127.0f)));
        return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23)));
    }
    static float sum(F a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
    static void sum4(F a, F b, F c, F d, float* out) {
        out[0] = sum(a);
        out[1] = sum(b);
        out[2] = sum(c);
        out[3] = sum(d);
    }
    static float largest(F a) {
        __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_max_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
    }

    static I iload(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
    static void istore(int32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<I*>(p), v); }
    static I iset(int32_t x) { return _mm256_set1_epi32(x); }
    static I iadd(I a, I b) { return _mm256_add_epi32(a, b); }
    static I isub(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I imul(I a, I b) { return _mm256_mullo_epi32(a, b); }
    static I imax(I a, I b) { return _mm256_max_epi32(a, b); }
    static I imin(I a, I b) { return _mm256_min_epi32(a, b); }
    static I ior(I a, I b) { return _mm256_or_si256(a, b); }
    static I low_byte(I a) { return _mm256_and_si256(a, _mm256_set1_epi32(255)); }
    template <int N>
    static I left(I a) { return _mm256_slli_epi32(a, N); }
    using M = __m256i;
    static M greater(I a, I b) { return _mm256_cmpgt_epi32(a, b); }
    static I half(I a) { return _mm256_srai_epi32(a, 1); }
    static M reaches(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
    static I pick(M m, I yes, I no) { return _mm256_blendv_epi8(no, yes, m); }
    static I add_where(M m, I a, I b) { return _mm256_add_epi32(a, _mm256_and_si256(m, b)); }
    static int32_t isum(I a) {
        __m128i s = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
    static int32_t ilargest(I a) {
        __m128i s = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        s = _mm_max_epi32(s, _mm_shuffle_epi32(s, 0x4e));
        return _mm_cvtsi128_si32(_mm_max_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
    static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
    static I to_int(F a) { return _mm256_cvtps_epi32(a); }
    static F as_float(I a) { return _mm256_castsi256_ps(a); }
    static I as_int(F a) { return _mm256_castps_si256(a); }

    static void store_bytes(uint8_t* p, I v) {
        const I pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                        0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        const I b = _mm256_shuffle_epi8(v, pick);
        const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
    }
    static I load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }

    static void store_transposed(const uint8_t* a, const uint8_t* b, const uint8_t* c, const uint8_t* d, int8_t* to,
                                 ptrdiff_t step) {
        for (int i = 0; i < W; i++, to += step) {
            memcpy(to, a + 4 * i, 4);
            memcpy(to + 4, b + 4 * i, 4);
            memcpy(to + 8, c + 4 * i, 4);
            memcpy(to + 12, d + 4 * i, 4);
        }
    }

    template <bool kWide>
    static I dot4(I acc, I a, I b) {
#ifdef __AVXVNNI__
        return _mm256_dpbusd_avx_epi32(acc, a, b);
#else
        if constexpr (kWide) {
            // Pairs of 8-bit times 8-bit products overflow the 16 bits of vpmaddubsw: even and odd bytes apart, in 16 bits.
            const I even_b = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8);
            const I even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)), even_b);
            const I odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
            return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
        } else {
            return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
        }
#endif
    }
};

}  // namespace
