// The kernel of 2-bit weights and activations for AVX2: products of two codes at a time by lookup.
//
// Two activation codes pick one of 16 constant tables, two weight codes one of its 16 bytes (vpshufb): the sum of their two
// products, plus 12 so that it is in [0, 18]; 14 of them fit into a byte. Then the bytes go to 16 bits: `pairs` sums them as
// words, `high` their upper halves, so that the lower halves' sums are pairs - 256 high. gemm_avx512table.cpp does it with
// three codes.
#include "avx2.h"
#include "kernels.h"
#include "row_steps.h"

namespace qvit::cpu {
namespace {

constexpr int size = 32, panel = 64, run = 14, block = 260 * run, offset = 12;

struct Tables {
    alignas(64) uint8_t bytes[16][16];
    constexpr Tables() : bytes() {
        for (int a = 0; a < 16; ++a)
            for (int w = 0; w < 16; ++w)
                bytes[a][w] = static_cast<uint8_t>(offset + (a & 3) * ((w & 3) - 2) + (a >> 2) * ((w >> 2) - 2));
    }
};
constexpr Tables tables;

constexpr int lookups(int K) { return (K + 1) / 2; }

// A prepared row: for each pair of codes the byte offset of its table.
size_t row_bytes(int K) { return round_up(static_cast<size_t>(lookups(K)), 64); }

void prepare(const uint8_t* a, ptrdiff_t lda, int rows, int K, uint8_t* out, ptrdiff_t pitch) {
    for (int row = 0; row < rows; ++row, a += lda, out += pitch) {
        for (int i = 0; i < K / 2; ++i) out[i] = static_cast<uint8_t>((a[2 * i] & 3) << 4 | (a[2 * i + 1] & 3) << 6);
        if (K % 2) out[K / 2] = static_cast<uint8_t>((a[K - 1] & 3) << 4);
    }
}

int field_bits(int) { return 4; }
size_t fields(int width, int K) { return static_cast<size_t>(lookups(K)) * static_cast<size_t>(width); }

// [pair][channel], of each vector of channels the first half in the even bytes.
void fill(const int8_t* codes, int M, int K, int, int first, int width, uint8_t* fields, int32_t*) {
    for (int channel = 0; channel < width; ++channel) {
        const int in_vector = channel % size, place = channel - in_vector + in_vector % (size / 2) * 2 + in_vector / (size / 2);
        for (int k = 0; k < K; ++k) {
            const int code = first + channel < M ? codes[static_cast<ptrdiff_t>(first + channel) * K + k] : 0;
            uint8_t& field = fields[static_cast<ptrdiff_t>(k / 2) * width + place];
            field = static_cast<uint8_t>(field | (code + 2) << k % 2 * 2);
        }
    }
}

constexpr StreamOrder order = {panel, size, 0, field_bits, fields, fill};

PackedWeight pack(const int8_t* codes, int M, int K, int bits) { return pack_panels(order, codes, M, K, bits); }

size_t scratch_bytes(int K) { return 64 + expanded_bytes(fields(panel, K), 4); }

const uint8_t* unpack(const PackedWeight& weight, int p, uint8_t* scratch) {
    const uint8_t* packed = weight.data.get() + weight.panel_bytes * static_cast<size_t>(p);
    const int width = panel_width(weight.M, weight.panel, size, p * weight.panel);
    expand_panel<Bytes256>(packed, 64, fields(width, weight.K), 4, 0, scratch);
    return scratch;
}

inline void add_lookup(__m256i& sum, __m256i table, __m256i index) {
    __m256i bytes;  // instructions, since from intrinsics GCC copies and spills the sums
    asm("vpshufb %3, %2, %1\n\tvpaddb %1, %0, %0" : "+x"(sum), "=&x"(bytes) : "x"(table), "x"(index));
}

// `rows` rows times `vectors` vectors of channels; lookups of the panel are `width` bytes apart.
template <int rows, int vectors>
void tile(const uint8_t* a, ptrdiff_t pitch, const uint8_t* w, int width, int count, bool add, int32_t* out, ptrdiff_t ld_out) {
    __m256i pairs[rows][vectors], high[rows][vectors];
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) pairs[r][v] = high[r][v] = _mm256_setzero_si256();
    for (int left = count; left > 0; left -= run) {
        __m256i sum[rows][vectors];
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) sum[r][v] = _mm256_setzero_si256();
        for (int i = left < run ? left : run; i; --i, ++a, w += width) {
            __m256i index[vectors];
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) index[v] = load(w + size * v);
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r) {
                const __m256i table =
                    _mm256_broadcastsi128_si256(*reinterpret_cast<const __m128i*>(tables.bytes[0] + a[r * pitch]));
#pragma GCC unroll 16
                for (int v = 0; v < vectors; ++v) add_lookup(sum[r][v], table, index[v]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) {
                pairs[r][v] = _mm256_add_epi16(pairs[r][v], sum[r][v]);
                high[r][v] = _mm256_add_epi16(high[r][v], _mm256_srli_epi16(sum[r][v], 8));
            }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) {
            alignas(64) uint16_t halves[2][size / 2];
            store(halves[0], pairs[r][v]);
            store(halves[1], high[r][v]);
            for (int i = 0; i < size / 2; ++i) {
                const uint16_t low = static_cast<uint16_t>(halves[0][i] - (halves[1][i] << 8));
                int32_t* place = out + r * ld_out + size * v + i;
                place[0] = low - offset * count + (add ? place[0] : 0);
                place[size / 2] = halves[1][i] - offset * count + (add ? place[size / 2] : 0);
            }
        }
}

void sums(const uint8_t* a, ptrdiff_t pitch, int rows, const uint8_t* unpacked, int K, int32_t* out, ptrdiff_t ld_out) {
    int width;
    __builtin_memcpy(&width, unpacked, sizeof width);
    for (int channel = 0; channel < width; channel += 2 * size) {
        row_steps<4>(rows, [&](auto step, int row) {
            for (int done = 0; done < lookups(K); done += block) {
                const int left = lookups(K) - done;
                (width - channel > size ? tile<step.value, 2>
                                        : tile<step.value, 1>)(a + row * pitch + done, pitch,
                                                               unpacked + 64 + static_cast<ptrdiff_t>(done) * width + channel,
                                                               width, left < block ? left : block, done > 0,
                                                               out + row * ld_out + channel, ld_out);
            }
        });
    }
}

}  // namespace

const GemmKernel avx2table_kernel = {"table2", Isa::avx2, panel, 4, row_bytes, prepare, pack, scratch_bytes, unpack, sums};

}  // namespace qvit::cpu
