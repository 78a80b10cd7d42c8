// The kernel of vpdpbusd on 256 bits: AVX-VNNI, of processors without AVX-512.
#include "kernels.h"

#if defined(__AVXVNNI__)

#include "avx2.h"
#include "quad_layout.h"
#include "row_steps.h"

namespace qvit::cpu {
namespace {

inline void dot(__m256i& sum, __m256i unsigned_bytes, __m256i signed_bytes) {
    // The VEX form: GCC would take the EVEX one of AVX-512 where both are allowed.
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(unsigned_bytes), "x"(signed_bytes));
}

// `rows` rows times 16 channels; the panel holds `width` channels.
template <int rows>
void tile(const uint8_t* a, ptrdiff_t lda, const uint8_t* w, int width, int groups, int32_t* out, ptrdiff_t ld_out) {
    __m256i sum[rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int g = 0; g < groups; ++g, a += 4, w += 4 * width) {
        const __m256i weight[2] = {load(w), load(w + 32)};
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            const __m256i code = group(a + r * lda);
            dot(sum[r][0], code, weight[0]);
            dot(sum[r][1], code, weight[1]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
        store(out + r * ld_out, sum[r][0]);
        store(out + r * ld_out + 8, sum[r][1]);
    }
}

void sums(const uint8_t* a, ptrdiff_t lda, int rows, const uint8_t* panel, int K, int32_t* out, ptrdiff_t ld_out) {
    int width;
    __builtin_memcpy(&width, panel, sizeof width);
    for (int channel = 0; channel < width; channel += 16)
        row_steps<6>(rows, [&](auto step, int row) {
            tile<step.value>(a + row * lda, lda, panel + 64 + 4 * channel, width, (K + 3) / 4, out + row * ld_out + channel,
                             ld_out);
        });
}

}  // namespace

const bool avxvnni_built = true;
const GemmKernel avxvnni_kernel = QuadLayout<Bytes256>::kernel("vpdpbusd256", Isa::avx2, 6, sums);

}  // namespace qvit::cpu

#else  // the compiler is too old for -mavxvnni

namespace qvit::cpu {

const bool avxvnni_built = false;
const GemmKernel avxvnni_kernel = {};

}  // namespace qvit::cpu

#endif
