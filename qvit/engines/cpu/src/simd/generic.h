// Eight lanes in plain C++: every other processor, and what the vector paths are tested against.
#pragma once

#include <math.h>
#include <string.h>

#include <cstddef>
#include <cstdint>

namespace {

struct Generic {
    static constexpr int W = 8;
    struct F { float v[W]; };
    struct I { int32_t v[W]; };

#define QVIT_EACH(Type, expression)            \
    {                                          \
        Type r;                                \
        for (int i = 0; i < W; i++) {          \
            r.v[i] = (expression);             \
        }                                      \
        return r;                              \
    }

    static F load(const float* p) QVIT_EACH(F, p[i])
    static void store(float* p, F v) { memcpy(p, v.v, sizeof v.v); }
    static F set(float x) QVIT_EACH(F, x)
    static F add(F a, F b) QVIT_EACH(F, a.v[i] + b.v[i])
    static F sub(F a, F b) QVIT_EACH(F, a.v[i] - b.v[i])
    static F mul(F a, F b) QVIT_EACH(F, a.v[i] * b.v[i])
    static F div(F a, F b) QVIT_EACH(F, a.v[i] / b.v[i])
    static F fma(F a, F b, F c) QVIT_EACH(F, fused(a.v[i], b.v[i], c.v[i]))
    static F fnma(F a, F b, F c) QVIT_EACH(F, fused(-a.v[i], b.v[i], c.v[i]))
    static F min(F a, F b) QVIT_EACH(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
    static F max(F a, F b) QVIT_EACH(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
    static F abs(F a) QVIT_EACH(F, fabsf(a.v[i]))
    static F round(F a) QVIT_EACH(F, nearest(a.v[i]))
    static F to_half(F a) QVIT_EACH(F, half_of(a.v[i]))
    static F first(F a, int n) QVIT_EACH(F, i < n ? a.v[i] : 0.0f)
    static F off_grid(F a) { return sub(a, round(a)); }         // a - round(a)
    static F max_abs(F a, F b) { return max(abs(a), abs(b)); }  // the larger magnitude
    static F scale2(F a, F n) QVIT_EACH(F, a.v[i] * power_of_two(n.v[i]))
    static float sum(F a) {
        return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
    }
    static void sum4(F a, F b, F c, F d, float* out) {
        out[0] = sum(a);
        out[1] = sum(b);
        out[2] = sum(c);
        out[3] = sum(d);
    }
    static float largest(F a) {
        float r = a.v[0];
        for (int i = 1; i < W; i++) {
            r = a.v[i] > r ? a.v[i] : r;
        }
        return r;
    }

    static I iload(const int32_t* p) QVIT_EACH(I, p[i])
    static void istore(int32_t* p, I v) { memcpy(p, v.v, sizeof v.v); }
    static I iset(int32_t x) QVIT_EACH(I, x)
    static I iadd(I a, I b) QVIT_EACH(I, a.v[i] + b.v[i])
    static I isub(I a, I b) QVIT_EACH(I, a.v[i] - b.v[i])
    static I imul(I a, I b) QVIT_EACH(I, a.v[i] * b.v[i])
    static I imax(I a, I b) QVIT_EACH(I, a.v[i] > b.v[i] ? a.v[i] : b.v[i])
    static I imin(I a, I b) QVIT_EACH(I, a.v[i] < b.v[i] ? a.v[i] : b.v[i])
    static I ior(I a, I b) QVIT_EACH(I, a.v[i] | b.v[i])
    static I low_byte(I a) QVIT_EACH(I, a.v[i] & 255)
    template <int N>
    static I left(I a) QVIT_EACH(I, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N))
    using M = I;
    static M greater(I a, I b) QVIT_EACH(M, a.v[i] > b.v[i] ? -1 : 0)
    static I half(I a) QVIT_EACH(I, a.v[i] >> 1)
    static M reaches(F a, F b) QVIT_EACH(M, a.v[i] >= b.v[i] ? -1 : 0)
    static I pick(M m, I yes, I no) QVIT_EACH(I, m.v[i] ? yes.v[i] : no.v[i])
    static I add_where(M m, I a, I b) QVIT_EACH(I, a.v[i] + (m.v[i] & b.v[i]))
    static int32_t isum(I a) {
        int32_t r = 0;
        for (int i = 0; i < W; i++) {
            r += a.v[i];
        }
        return r;
    }
    static int32_t ilargest(I a) {
        int32_t r = a.v[0];
        for (int i = 1; i < W; i++) {
            r = a.v[i] > r ? a.v[i] : r;
        }
        return r;
    }
    static F to_float(I a) QVIT_EACH(F, static_cast<float>(a.v[i]))
    // What the vector instructions do: half to even, and the smallest integer for what does not fit.
    static I to_int(F a) QVIT_EACH(I, whole(a.v[i]))
    static void store_bytes(uint8_t* p, I v) {
        for (int i = 0; i < W; i++) {
            p[i] = static_cast<uint8_t>(v.v[i]);
        }
    }
    static I load_bytes(const uint8_t* p) QVIT_EACH(I, p[i])

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
        int8_t w[4 * W];
        uint8_t x[4 * W];
        memcpy(x, a.v, sizeof x);
        memcpy(w, b.v, sizeof w);
        for (int i = 0; i < W; i++) {
            for (int j = 4 * i; j < 4 * i + 4; j++) {
                acc.v[i] += x[j] * w[j];
            }
        }
        return acc;
    }
#undef QVIT_EACH

   private:
    // Products of two floats are exact in double, so this rounds almost as a fused operation, at any optimisation level.
    static float fused(float a, float b, float c) { return static_cast<float>(static_cast<double>(a) * b + c); }
    static float nearest(float x) {
        // Adding and taking away 1.5 * 2^23 rounds to whole numbers, half to even; larger magnitudes are whole already.
        if (!(fabsf(x) < 4194304.0f)) {
            return x;
        }
        return (x + 12582912.0f) - 12582912.0f;
    }
    // The nearest float16. A power of two that is 2^13 times that of x has float16's last place as its own: adding and taking
    // it away rounds x to it, half to even. Below 2^-14 the last place of float16 stays.
    static float half_of(float x) {
        const float size = fabsf(x);
        if (!(size < 65520.0f)) {
            return x * INFINITY;
        }
        uint32_t bits;
        memcpy(&bits, &size, sizeof bits);
        bits &= 0x7f800000u;
        float power;
        memcpy(&power, &bits, sizeof power);
        const float shift = (power < 0x1p-14f ? 0x1p-14f : power) * 8192.0f;
        return copysignf((size + shift) - shift, x);
    }
    static int32_t whole(float x) {
        return x >= -2147483648.0f && x < 2147483648.0f ? static_cast<int32_t>(nearest(x)) : INT32_MIN;
    }
    static float power_of_two(float n) {
        const int e = static_cast<int>(n < -127.0f ? -127.0f : n) + 127;
        const uint32_t bits = static_cast<uint32_t>(e) << 23;
        float r;
        memcpy(&r, &bits, sizeof r);
        return r;
    }
};

}  // namespace
