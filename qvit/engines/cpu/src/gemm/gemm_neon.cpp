// The kernel of the dot product instruction of aarch64 (sdot, armv8.2-a+dotprod): 4 products of signed bytes to each of 4
// int32.
//
// Activations of up to 7 bits are signed bytes as they are. Of 8 bits, 128 is subtracted from each, and 128 times the sum of
// the channel's weights, found alongside as two more products with 64, added.
#include <arm_neon.h>

#include "expand.h"
#include "kernels.h"
#include "quad_layout.h"
#include "row_steps.h"

namespace qvit::cpu {
namespace {

struct Bytes128 {
    using Vector = uint8x16_t;
    static constexpr int size = 16;
    static Vector load(const uint8_t* p) { return vld1q_u8(p); }
    static void store(uint8_t* p, Vector v) { vst1q_u8(p, v); }
    static Vector fill(int byte) { return vdupq_n_u8(static_cast<uint8_t>(byte)); }
    static Vector both(Vector a, Vector b) { return vandq_u8(a, b); }
    static Vector either(Vector a, Vector b) { return vorrq_u8(a, b); }
    static Vector minus(Vector a, Vector b) { return vsubq_u8(a, b); }
    template <int n>
    static Vector down(Vector a) {
        return vshrq_n_u8(a, n);
    }
    template <int n>
    static Vector up(Vector a) {
        return vshlq_n_u8(a, n);
    }
};

// `rows` rows times 16 channels; the panel holds `width` channels.
template <int rows, bool eight_bits>
void tile(const uint8_t* a, ptrdiff_t lda, const uint8_t* w, int width, int groups, int32_t* out, ptrdiff_t ld_out) {
    int32x4_t sum[rows][4], shift[4];
#pragma GCC unroll 16
    for (int v = 0; v < 4; ++v) {
        shift[v] = vdupq_n_s32(0);
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) sum[r][v] = vdupq_n_s32(0);
    }
    const int8x16_t half = vdupq_n_s8(64), top = vdupq_n_s8(-128);
    for (int g = 0; g < groups; ++g, a += 4, w += 4 * width) {
        int8x16_t weight[4];
#pragma GCC unroll 16
        for (int v = 0; v < 4; ++v) {
            weight[v] = vld1q_s8(reinterpret_cast<const int8_t*>(w + 16 * v));
            if constexpr (eight_bits) shift[v] = vdotq_s32(vdotq_s32(shift[v], weight[v], half), weight[v], half);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            int32_t codes;
            __builtin_memcpy(&codes, a + r * lda, 4);
            int8x16_t code = vreinterpretq_s8_s32(vdupq_n_s32(codes));
            if constexpr (eight_bits) code = veorq_s8(code, top);
#pragma GCC unroll 16
            for (int v = 0; v < 4; ++v) sum[r][v] = vdotq_s32(sum[r][v], weight[v], code);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < 4; ++v) vst1q_s32(out + r * ld_out + 4 * v, vaddq_s32(sum[r][v], shift[v]));
}

template <bool eight_bits>
void sums(const uint8_t* a, ptrdiff_t lda, int rows, const uint8_t* panel, int K, int32_t* out, ptrdiff_t ld_out) {
    int width;
    __builtin_memcpy(&width, panel, sizeof width);
    for (int channel = 0; channel < width; channel += 16)
        row_steps<4>(rows, [&](auto step, int row) {
            tile<step.value, eight_bits>(a + row * lda, lda, panel + 64 + 4 * channel, width, (K + 3) / 4,
                                         out + row * ld_out + channel, ld_out);
        });
}

}  // namespace

const GemmKernel neon_kernel = QuadLayout<Bytes128>::kernel("sdot", Isa::neon, 4, sums<false>);
const GemmKernel neon8_kernel = QuadLayout<Bytes128>::kernel("sdot8", Isa::neon, 4, sums<true>);

}  // namespace qvit::cpu
