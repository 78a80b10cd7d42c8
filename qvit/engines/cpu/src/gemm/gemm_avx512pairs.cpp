// The kernel of few bits on vpdpbusd: two products from each multiplication.
//
// Winograd's identity (IEEE Trans. Computers C-17, 1968) for codes a0 a1 and w0 w1,
//
//     (a0 + w1) (a1 + w0) = a0 w0 + a1 w1 + a0 a1 + w0 w1,
//
// trades one multiplication for two additions, and byte additions run on all vector pipes, vpdpbusd on half of them. With
// weights stored biased, w' = w + b, b = 2^(bits-1), both factors are bytes without sign, small enough for vpdpbusd's signed
// operand:
//
//     sum a w  =  sum (a0 + w1') (a1 + w0')  -  [sum w0' w1']  -  [sum a0 a1 + b sum a]
//
// The first bracket is a channel's term, kept with the weights; the second a row's, kept behind the prepared codes of the row.
// a0 and a1 are groups of 4 consecutive codes.
#include "avx512.h"
#include "kernels.h"
#include "row_steps.h"

namespace qvit::cpu {
namespace {

// Codes, zeros up to a multiple of 64, then one int32 a bias: the row's term for biases 2, 4, 8.
size_t term_offset(int K) { return round_up(static_cast<size_t>(K), 64); }
size_t row_bytes(int K) { return term_offset(K) + 64; }

void prepare(const uint8_t* a, ptrdiff_t lda, int rows, int K, uint8_t* out, ptrdiff_t pitch) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int row = 0; row < rows; ++row, a += lda, out += pitch) {
        __m512i products = _mm512_setzero_si512(), codes = _mm512_setzero_si512();
        for (int k = 0; k < K; k += 64) {
            const __mmask64 here = K - k >= 64 ? ~0ull : (1ull << (K - k)) - 1;
            const __m512i code = _mm512_maskz_loadu_epi8(here, a + k);
            _mm512_store_si512(out + k, code);
            // Each group times its partner: every product appears twice.
            products = _mm512_dpbusd_epi32(products, code, _mm512_shuffle_epi32(code, _MM_PERM_CDAB));
            codes = _mm512_dpbusd_epi32(codes, code, ones);
        }
        const int product = _mm512_reduce_add_epi32(products) / 2, code = _mm512_reduce_add_epi32(codes);
        int* terms = reinterpret_cast<int*>(out + term_offset(K));
        for (int i = 0; i < 3; ++i) terms[i] = product + code * (2 << i);
    }
}

PackedWeight pack(const int8_t* codes, int M, int K, int bits) { return pack_panels(quad_pair_order, codes, M, K, bits); }

size_t scratch_bytes(int K) {
    const int panel = quad_pair_order.panel;
    return header_bytes(panel, 1) + expanded_bytes(quad_pair_order.fields(panel, K), 3);
}

const uint8_t* unpack(const PackedWeight& weight, int p, uint8_t* scratch) {
    const uint8_t* panel = weight.data.get() + weight.panel_bytes * static_cast<size_t>(p);
    const int width = panel_width(weight.M, weight.panel, 16, p * weight.panel);
    expand_panel<Bytes512>(panel, header_bytes(width, 1), quad_pair_order.fields(width, weight.K), weight.bits, 0, scratch);
    reinterpret_cast<int*>(scratch)[1] = weight.bits;
    return scratch;
}

template <int rows, int vectors>
void tile(const uint8_t* a, ptrdiff_t pitch, ptrdiff_t term, const uint8_t* panel, int pairs, int32_t* out, ptrdiff_t ld_out) {
    __m512i sum[rows][vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
        const __m512i channel = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_load_si512(panel + 64 + 64 * v));
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) sum[r][v] = channel;
    }
    const uint8_t* w = panel + 64 + 64 * vectors;
    const uint8_t* codes = a;
    for (int g = 0; g < pairs; ++g, codes += 8, w += 128 * vectors) {
        __m512i w0[vectors], w1[vectors];
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
            w0[v] = _mm512_load_si512(w + 64 * v);
            w1[v] = _mm512_load_si512(w + 64 * (vectors + v));
            hold(w0[v]);
            hold(w1[v]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            int group[2];
            __builtin_memcpy(group, codes + r * pitch, 8);
            const __m512i a0 = _mm512_set1_epi32(group[0]), a1 = _mm512_set1_epi32(group[1]);
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) dot(sum[r][v], _mm512_add_epi8(a0, w1[v]), _mm512_add_epi8(a1, w0[v]));
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
        const __m512i row = _mm512_set1_epi32(*reinterpret_cast<const int*>(a + r * pitch + term));
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) _mm512_storeu_si512(out + r * ld_out + 16 * v, _mm512_sub_epi32(sum[r][v], row));
    }
}

template <int vectors, int max_rows>
void panel_sums(const uint8_t* a, ptrdiff_t pitch, int rows, const uint8_t* panel, int K, int32_t* out, ptrdiff_t ld_out) {
    const ptrdiff_t term = static_cast<ptrdiff_t>(term_offset(K)) + 4 * (reinterpret_cast<const int*>(panel)[1] - 2);
    const int pairs = (K + 7) / 8;
    row_steps<max_rows>(rows, [&](auto step, int row) {
        tile<step.value, vectors>(a + row * pitch, pitch, term, panel, pairs, out + row * ld_out, ld_out);
    });
}

void sums(const uint8_t* a, ptrdiff_t pitch, int rows, const uint8_t* panel, int K, int32_t* out, ptrdiff_t ld_out) {
    switch (*reinterpret_cast<const int*>(panel)) {
        case 64:
            return panel_sums<4, 4>(a, pitch, rows, panel, K, out, ld_out);
        case 48:
            return panel_sums<3, 6>(a, pitch, rows, panel, K, out, ld_out);
        case 32:
            return panel_sums<2, 8>(a, pitch, rows, panel, K, out, ld_out);
        default:
            return panel_sums<1, 8>(a, pitch, rows, panel, K, out, ld_out);
    }
}

}  // namespace

const GemmKernel avx512pairs_kernel = {"pairs", Isa::avx512vnni, 64, 4, row_bytes, prepare, pack, scratch_bytes, unpack, sums};

}  // namespace qvit::cpu
