// The kernel of vpdpbusd: any widths; each instruction adds 4 products of unsigned by signed bytes to each of 16 int32.
#include "avx512.h"
#include "kernels.h"
#include "quad_layout.h"
#include "row_steps.h"

namespace qvit::cpu {
namespace {

// `rows` rows times `vectors` vectors of 16 channels, all sums in registers.
template <int rows, int vectors>
void tile(const uint8_t* a, ptrdiff_t lda, const uint8_t* w, int groups, int32_t* out, ptrdiff_t ld_out) {
    __m512i sum[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_setzero_si512();
    for (int g = 0; g < groups; ++g, a += 4, w += 64 * vectors) {
        __m512i weight[vectors];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) hold(weight[v] = _mm512_load_si512(w + 64 * v));
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            int codes;
            __builtin_memcpy(&codes, a + r * lda, 4);
            const __m512i code = _mm512_set1_epi32(codes);
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) dot(sum[r][v], code, weight[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) _mm512_storeu_si512(out + r * ld_out + 16 * v, sum[r][v]);
}

template <int vectors, int max_rows>
void panel_sums(const uint8_t* a, ptrdiff_t lda, int rows, const uint8_t* w, int groups, int32_t* out, ptrdiff_t ld_out) {
    row_steps<max_rows>(rows, [&](auto step, int row) {
        tile<step.value, vectors>(a + row * lda, lda, w, groups, out + row * ld_out, ld_out);
    });
}

void sums(const uint8_t* a, ptrdiff_t lda, int rows, const uint8_t* panel, int K, int32_t* out, ptrdiff_t ld_out) {
    int width;
    __builtin_memcpy(&width, panel, sizeof width);
    const int groups = (K + 3) / 4;
    switch (width) {
        case 64:
            return panel_sums<4, 6>(a, lda, rows, panel + 64, groups, out, ld_out);
        case 48:
            return panel_sums<3, 8>(a, lda, rows, panel + 64, groups, out, ld_out);
        case 32:
            return panel_sums<2, 12>(a, lda, rows, panel + 64, groups, out, ld_out);
        default:
            return panel_sums<1, 12>(a, lda, rows, panel + 64, groups, out, ld_out);
    }
}

}  // namespace

const GemmKernel avx512vnni_kernel = QuadLayout<Bytes512>::kernel("vpdpbusd", Isa::avx512vnni, 6, sums);

}  // namespace qvit::cpu
