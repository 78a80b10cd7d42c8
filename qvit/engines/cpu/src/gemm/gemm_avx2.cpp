// Kernels for AVX2: vpmaddubsw for what cannot saturate it, 16-bit products for 8 x 8 bits.
//
// vpmaddubsw adds two products of unsigned by signed bytes in 16 bits, with saturation. The sum of a pair is at most
// 2 (2^act_bits - 1) 2^(weight_bits - 1) in size, so 16 bits hold `run` of them exactly, where run is 32767 over that; then
// vpmaddwd brings neighbours together in 32 bits.
#include "avx2.h"
#include "kernels.h"
#include "quad_layout.h"
#include "row_steps.h"

namespace qvit::cpu {
namespace {

using Layout = QuadLayout<Bytes256>;

// sum + products, as instructions: from intrinsics GCC makes a loop that copies and spills the sums.
inline void add_bytes(__m256i& sum, __m256i unsigned_bytes, __m256i signed_bytes) {
    __m256i products;
    asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(unsigned_bytes), "x"(signed_bytes));
}
inline void add_words(__m256i& sum, __m256i a, __m256i b) {
    __m256i products;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(b));
}

// `rows` rows times 16 channels; the panel holds `width` channels.
template <int rows>
void tile(const uint8_t* a, ptrdiff_t lda, const uint8_t* w, int width, int groups, int run, int32_t* out, ptrdiff_t ld_out) {
    const __m256i ones = _mm256_set1_epi16(1);
    for (int done = 0; done < groups; done += run) {
        __m256i sum[rows][2];
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
        for (int i = groups - done < run ? groups - done : run; i; --i, a += 4, w += 4 * width) {
            const __m256i weight[2] = {load(w), load(w + 32)};
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
                const __m256i code = group(a + r * lda);
                add_bytes(sum[r][0], code, weight[0]);
                add_bytes(sum[r][1], code, weight[1]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < 2; ++v) {
                __m256i total = _mm256_madd_epi16(sum[r][v], ones);
                int32_t* place = out + r * ld_out + 8 * v;
                if (done) total = _mm256_add_epi32(total, load(place));
                store(place, total);
            }
    }
}

// For weights of weight_bits and activations of act_bits, at most.
template <int weight_bits, int act_bits>
void sums(const uint8_t* a, ptrdiff_t lda, int rows, const uint8_t* panel, int K, int32_t* out, ptrdiff_t ld_out) {
    constexpr int run = 32767 / (2 * ((1 << act_bits) - 1) << (weight_bits - 1));
    static_assert(run > 0);
    int width;
    __builtin_memcpy(&width, panel, sizeof width);
    for (int channel = 0; channel < width; channel += 16)
        row_steps<6>(rows, [&](auto step, int row) {
            tile<step.value>(a + row * lda, lda, panel + 64 + 4 * channel, width, (K + 3) / 4, run,
                             out + row * ld_out + channel, ld_out);
        });
}

// 8 x 8 bits: weights and activations at 16 bits, 2 products an instruction and 32-bit sum.

size_t wide_row_bytes(int K) { return 2 * round_up(static_cast<size_t>(K), 32); }

void wide_prepare(const uint8_t* a, ptrdiff_t lda, int rows, int K, uint8_t* out, ptrdiff_t pitch) {
    for (int row = 0; row < rows; ++row, a += lda, out += pitch) {
        uint16_t* wide = reinterpret_cast<uint16_t*>(out);
        for (int k = 0; k < K; ++k) wide[k] = a[k];
        for (int k = K; k < static_cast<int>(round_up(static_cast<size_t>(K), 32)); ++k) wide[k] = 0;
    }
}

// Room for the words, and behind them for the bytes that they come from.
size_t wide_scratch_bytes(int K) { return 3 * Layout::scratch_bytes(K); }

// Each group of 4 bytes becomes 4 words.
const uint8_t* wide_unpack(const PackedWeight& weight, int p, uint8_t* scratch) {
    const size_t fields = Layout::fields(weight, p);
    const uint8_t* panel = Layout::unpack(weight, p, scratch + 64 + round_up(2 * fields, 64));
    for (int i = 0; i < 64; i += 32) store(scratch + i, load(panel + i));
    for (size_t i = 0; i < fields; i += 16)
        store(scratch + 64 + 2 * i, _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel + 64 + i))));
    return scratch;
}

// `rows` rows times 8 channels, whose even and odd pairs of words are summed apart until the end.
template <int rows>
void wide_tile(const uint8_t* a, ptrdiff_t pitch, const uint8_t* w, int width, int groups, int32_t* out, ptrdiff_t ld_out) {
    __m256i sum[rows][2];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) sum[r][0] = sum[r][1] = _mm256_setzero_si256();
    for (int g = 0; g < groups; ++g, a += 8, w += 8 * width) {
        const __m256i weight[2] = {load(w), load(w + 32)};
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            long long codes;
            __builtin_memcpy(&codes, a + r * pitch, 8);
            const __m256i code = _mm256_set1_epi64x(codes);
            add_words(sum[r][0], code, weight[0]);
            add_words(sum[r][1], code, weight[1]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r) {
        // Per 128-bit half: channels 0 1 | 4 5, then 2 3 | 6 7 in the order of the halves.
        const __m256i both = _mm256_hadd_epi32(sum[r][0], sum[r][1]);
        store(out + r * ld_out, _mm256_permute4x64_epi64(both, 0xd8));
    }
}

void wide_sums(const uint8_t* a, ptrdiff_t pitch, int rows, const uint8_t* panel, int K, int32_t* out, ptrdiff_t ld_out) {
    int width;
    __builtin_memcpy(&width, panel, sizeof width);
    for (int channel = 0; channel < width; channel += 8)
        row_steps<6>(rows, [&](auto step, int row) {
            wide_tile<step.value>(a + row * pitch, pitch, panel + 64 + 8 * channel, width, (K + 3) / 4,
                                  out + row * ld_out + channel, ld_out);
        });
}

}  // namespace

const GemmKernel avx2_4x4_kernel = Layout::kernel("maddubs 4x4", Isa::avx2, 6, sums<4, 4>);
const GemmKernel avx2_4x8_kernel = Layout::kernel("maddubs 4x8", Isa::avx2, 6, sums<4, 8>);
const GemmKernel avx2_8x7_kernel = Layout::kernel("maddubs 8x7", Isa::avx2, 6, sums<8, 7>);
const GemmKernel avx2_kernel = {"maddwd",     Isa::avx2,          64,          6,        wide_row_bytes, wide_prepare,
                                Layout::pack, wide_scratch_bytes, wide_unpack, wide_sums};

}  // namespace qvit::cpu
