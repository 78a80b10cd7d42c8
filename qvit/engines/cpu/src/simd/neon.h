// Four lanes: AArch64 NEON with the dot-product extension.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <string.h>

namespace {

struct Neon {
    static constexpr int W = 4;
    using F = float32x4_t;
    using I = int32x4_t;

    static F load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, F v) { vst1q_f32(p, v); }
    static F set(float x) { return vdupq_n_f32(x); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
    static F fnma(F a, F b, F c) { return vfmsq_f32(c, a, b); }
    static F min(F a, F b) { return vminq_f32(a, b); }
    static F max(F a, F b) { return vmaxq_f32(a, b); }
    static F abs(F a) { return vabsq_f32(a); }
    static F round(F a) { return vrndnq_f32(a); }
    static F to_half(F a) { return vcvt_f32_f16(vcvt_f16_f32(a)); }  // the nearest float16
    static F first(F a, int n) {
        const int32_t lanes[4] = {0, 1, 2, 3};
        return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(a), vcgtq_s32(vdupq_n_s32(n), vld1q_s32(lanes))));
    }
    static F off_grid(F a) { return sub(a, round(a)); }         // a - round(a)
    static F max_abs(F a, F b) { return max(abs(a), abs(b)); }  // the larger magnitude
    static F scale2(F a, F n) {
        const I e = vaddq_s32(to_int(max(n, set(-127.0f))), vdupq_n_s32(127));
        return mul(a, vreinterpretq_f32_s32(vshlq_n_s32(e, 23)));
    }
    static float sum(F a) { return vaddvq_f32(a); }
    static void sum4(F a, F b, F c, F d, float* out) {
        out[0] = sum(a);
        out[1] = sum(b);
        out[2] = sum(c);
        out[3] = sum(d);
    }
    static float largest(F a) { return vmaxvq_f32(a); }

    static I iload(const int32_t* p) { return vld1q_s32(p); }
    static void istore(int32_t* p, I v) { vst1q_s32(p, v); }
    static I iset(int32_t x) { return vdupq_n_s32(x); }
    static I iadd(I a, I b) { return vaddq_s32(a, b); }
    static I isub(I a, I b) { return vsubq_s32(a, b); }
    static I imul(I a, I b) { return vmulq_s32(a, b); }
    static I imax(I a, I b) { return vmaxq_s32(a, b); }
    static I imin(I a, I b) { return vminq_s32(a, b); }
    static I ior(I a, I b) { return vorrq_s32(a, b); }
    static I low_byte(I a) { return vandq_s32(a, vdupq_n_s32(255)); }
    template <int N>
    static I left(I a) { return vshlq_n_s32(a, N); }
    using M = uint32x4_t;
    static M greater(I a, I b) { return vcgtq_s32(a, b); }
    static I half(I a) { return vshrq_n_s32(a, 1); }
    static M reaches(F a, F b) { return vcgeq_f32(a, b); }
    static I pick(M m, I yes, I no) { return vbslq_s32(m, yes, no); }
    static I add_where(M m, I a, I b) { return vaddq_s32(a, vandq_s32(vreinterpretq_s32_u32(m), b)); }
    static int32_t isum(I a) { return vaddvq_s32(a); }
    static int32_t ilargest(I a) { return vmaxvq_s32(a); }
    static F to_float(I a) { return vcvtq_f32_s32(a); }
    static I to_int(F a) { return vcvtnq_s32_f32(a); }

    static void store_bytes(uint8_t* p, I v) {
        const uint16x4_t half = vmovn_u32(vreinterpretq_u32_s32(v));
        const uint32_t word = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(half, half))), 0);
        memcpy(p, &word, 4);
    }
    static I load_bytes(const uint8_t* p) {
        uint32_t word;
        memcpy(&word, p, 4);
        return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(word))))));
    }

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
        // sdot needs both signed: the unsigned operand less 128, and 128 times the sum of the other given back.
        const int8x16_t w = vreinterpretq_s8_s32(b);
        const int8x16_t x = vreinterpretq_s8_s32(a);
        if constexpr (!kWide) {
            return vdotq_s32(acc, x, w);  // codes below 128 are signed bytes as they are
        } else {
            const int8x16_t shifted = veorq_s8(x, vdupq_n_s8(-128));
            return vdotq_s32(vaddq_s32(acc, vshlq_n_s32(vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), w), 7)), shifted, w);
        }
    }
};

}  // namespace
