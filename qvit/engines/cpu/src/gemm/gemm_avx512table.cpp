// The kernel of 2-bit weights and activations: products of three codes at a time by lookup.
//
// Three activation codes pick one of 64 constant tables, three weight codes one of its 64 bytes (vpermb): the sum of their
// three products, plus 18 so that it is in [0, 27]. One lookup and one byte addition thus do 192 multiply-adds, and 9 of them
// fit into a byte. Then the bytes go to 16 bits: `pairs` sums them as 16-bit words, `high` their upper halves, so that the
// lower halves' sums are pairs - 256 high.
#include "avx512.h"
#include "kernels.h"
#include "row_steps.h"

namespace qvit::cpu {
namespace {

constexpr int panel_channels = 128;
constexpr int run = 9;            // lookups that fit into a byte: 9 * 27 < 256
constexpr int block = 269 * run;  // lookups that fit into 16 bits: 2421 * 27 < 65536
constexpr int offset = 18;

struct Tables {
    alignas(64) uint8_t bytes[64][64];
    constexpr Tables() : bytes() {
        for (int a = 0; a < 64; ++a)
            for (int w = 0; w < 64; ++w) {
                int sum = offset;
                for (int i = 0; i < 6; i += 2) sum += (a >> i & 3) * ((w >> i & 3) - 2);
                bytes[a][w] = static_cast<uint8_t>(sum);
            }
    }
};
constexpr Tables tables;

constexpr int triples(int K) { return (K + 2) / 3; }

// A prepared row: for each triple of codes the byte offset of its table, uint16.
size_t row_bytes(int K) { return round_up(2 * static_cast<size_t>(triples(K)), 64); }

struct Gather {
    alignas(64) uint8_t index[64];
    constexpr Gather() : index() {
        for (int i = 0; i < 64; ++i) index[i] = static_cast<uint8_t>(i % 4 == 3 ? 63 : i / 4 * 3 + i % 4);
    }
};
constexpr Gather gather;

void prepare(const uint8_t* a, ptrdiff_t lda, int rows, int K, uint8_t* out, ptrdiff_t pitch) {
    const __m512i index = _mm512_load_si512(gather.index), three = _mm512_set1_epi8(3);
    const __m512i places = _mm512_set1_epi32(1 | 4 << 8 | 16 << 16);
    for (int row = 0; row < rows; ++row, a += lda, out += pitch) {
        for (int k = 0; k < K; k += 48) {
            const __mmask64 here = (1ull << (K - k < 48 ? K - k : 48)) - 1;
            // A code above 3 would point outside the tables.
            const __m512i code = _mm512_and_si512(_mm512_maskz_loadu_epi8(here, a + k), three);
            const __m512i triple = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_permutexvar_epi8(index, code), places);
            _mm256_store_si256(reinterpret_cast<__m256i*>(out + k / 3 * 2),
                               _mm512_cvtepi32_epi16(_mm512_slli_epi32(triple, 6)));
        }
    }
}

int field_bits(int) { return 6; }
size_t fields(int width, int K) { return static_cast<size_t>(triples(K)) * static_cast<size_t>(width); }

// [triple][channel], of each 64 channels the first 32 in the even bytes.
void fill(const int8_t* codes, int M, int K, int, int first, int width, uint8_t* fields, int32_t*) {
    for (int channel = 0; channel < width; ++channel) {
        const int place = channel / 64 * 64 + channel % 32 * 2 + channel % 64 / 32;
        for (int k = 0; k < K; ++k) {
            const int code = first + channel < M ? codes[static_cast<ptrdiff_t>(first + channel) * K + k] : 0;
            uint8_t& field = fields[k / 3 * width + place];
            field = static_cast<uint8_t>(field | (code + 2) << k % 3 * 2);
        }
    }
}

constexpr StreamOrder order = {panel_channels, 64, 0, field_bits, fields, fill};

PackedWeight pack(const int8_t* codes, int M, int K, int bits) { return pack_panels(order, codes, M, K, bits); }

size_t scratch_bytes(int K) { return 64 + expanded_bytes(fields(panel_channels, K), 6); }

const uint8_t* unpack(const PackedWeight& weight, int p, uint8_t* scratch) {
    const uint8_t* panel = weight.data.get() + weight.panel_bytes * static_cast<size_t>(p);
    const int width = panel_width(weight.M, weight.panel, 64, p * weight.panel);
    expand_panel<Bytes512>(panel, 64, fields(width, weight.K), 6, 0, scratch);
    return scratch;
}

template <int rows, int vectors>
void tile(const uint8_t* a, ptrdiff_t pitch, const uint8_t* w, int lookups, bool add, int32_t* out, ptrdiff_t ld_out) {
    __m512i pairs[rows][vectors], high[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) pairs[r][v] = high[r][v] = _mm512_setzero_si512();
    for (int left = lookups; left > 0; left -= run) {
        __m512i sum[rows][vectors];
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) sum[r][v] = _mm512_setzero_si512();
        for (int i = left < run ? left : run; i; --i, a += 2, w += 64 * vectors) {
            __m512i index[vectors];
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) hold(index[v] = _mm512_load_si512(w + 64 * v));
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
                const __m512i table = _mm512_load_si512(tables.bytes[0] + *reinterpret_cast<const uint16_t*>(a + r * pitch));
#pragma GCC unroll 16
                for (int v = 0; v < vectors; ++v)
                    sum[r][v] = _mm512_add_epi8(sum[r][v], _mm512_permutexvar_epi8(index[v], table));
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) {
                pairs[r][v] = _mm512_add_epi16(pairs[r][v], sum[r][v]);
                high[r][v] = _mm512_add_epi16(high[r][v], _mm512_srli_epi16(sum[r][v], 8));
            }
    }
    const __m512i offsets = _mm512_set1_epi32(offset * lookups);
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
            const __m512i half[2] = {_mm512_sub_epi16(pairs[r][v], _mm512_slli_epi16(high[r][v], 8)), high[r][v]};
#pragma GCC unroll 16
            for (int i = 0; i < 4; ++i) {
                const __m256i part = i % 2 ? _mm512_extracti64x4_epi64(half[i / 2], 1) : _mm512_castsi512_si256(half[i / 2]);
                __m512i sums = _mm512_sub_epi32(_mm512_cvtepu16_epi32(part), offsets);
                int32_t* place = out + r * ld_out + 64 * v + 16 * i;
                if (add) sums = _mm512_add_epi32(sums, _mm512_loadu_si512(place));
                _mm512_storeu_si512(place, sums);
            }
        }
}

template <int vectors, int max_rows>
void panel_sums(const uint8_t* a, ptrdiff_t pitch, int rows, const uint8_t* w, int lookups, int32_t* out, ptrdiff_t ld_out) {
    row_steps<max_rows>(rows, [&](auto step, int row) {
        for (int done = 0; done < lookups; done += block)
            tile<step.value, vectors>(a + row * pitch + 2 * done, pitch, w + static_cast<ptrdiff_t>(done) * 64 * vectors,
                                      lookups - done < block ? lookups - done : block, done > 0, out + row * ld_out, ld_out);
    });
}

void sums(const uint8_t* a, ptrdiff_t pitch, int rows, const uint8_t* panel, int K, int32_t* out, ptrdiff_t ld_out) {
    const bool whole = *reinterpret_cast<const int*>(panel) == panel_channels;
    (whole ? panel_sums<2, 4> : panel_sums<1, 8>)(a, pitch, rows, panel + 64, triples(K), out, ld_out);
}

}  // namespace

const GemmKernel avx512table_kernel = {"table3", Isa::avx512vnni, panel_channels, 4,   row_bytes, prepare,
                                       pack,     scratch_bytes,   unpack,         sums};

}  // namespace qvit::cpu
