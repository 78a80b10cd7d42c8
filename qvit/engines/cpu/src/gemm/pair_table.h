// The kernel of 2-bit weights and activations for tables of 16 bytes (vpshufb of AVX2, tbl of NEON).
//
// Two activation codes pick one of 16 constant tables, two weight codes one of its 16 bytes: the sum of their two products, plus
// 12 so that it is in [0, 18]; 14 of them fit into a byte. Then the bytes go to 16 bits: `pairs` sums them as words, `high` their
// upper halves, so that the lower halves' sums are pairs - 256 high. gemm_avx512table.cpp does the same with three codes.
//
// `Bytes` is the wrapper of expand.h with zero, table (16 bytes, repeated), add_lookup, plus_words and plus_high (of words).
#pragma once

#include "expand.h"
#include "row_steps.h"

namespace qvit::cpu {
namespace {

template <class Bytes>
struct PairTable {
    using V = typename Bytes::Vector;
    static constexpr int size = Bytes::size, panel = 64, run = 14, block = 260 * run, offset = 12;

    struct Tables {
        alignas(64) uint8_t bytes[16][16];
        constexpr Tables() : bytes() {
            for (int a = 0; a < 16; ++a)
                for (int w = 0; w < 16; ++w)
                    bytes[a][w] = static_cast<uint8_t>(offset + (a & 3) * ((w & 3) - 2) + (a >> 2) * ((w >> 2) - 2));
        }
    };
    static constexpr Tables tables{};

    static constexpr int lookups(int K) { return (K + 1) / 2; }

    // A prepared row: for each pair of codes the byte offset of its table.
    static size_t row_bytes(int K) { return round_up(static_cast<size_t>(lookups(K)), 64); }

    static void prepare(const uint8_t* a, ptrdiff_t lda, int rows, int K, uint8_t* out, ptrdiff_t pitch) {
        for (int row = 0; row < rows; ++row, a += lda, out += pitch) {
            for (int i = 0; i < K / 2; ++i) out[i] = static_cast<uint8_t>((a[2 * i] & 3) << 4 | (a[2 * i + 1] & 3) << 6);
            if (K % 2) out[K / 2] = static_cast<uint8_t>((a[K - 1] & 3) << 4);
        }
    }

    static int field_bits(int) { return 4; }
    static size_t fields(int width, int K) { return static_cast<size_t>(lookups(K)) * static_cast<size_t>(width); }

    // [pair][channel], of each vector of channels the first half in the even bytes.
    static void fill(const int8_t* codes, int M, int K, int, int first, int width, uint8_t* fields, int32_t*) {
        for (int channel = 0; channel < width; ++channel) {
            const int in_vector = channel % size, place = channel - in_vector + in_vector % (size / 2) * 2 + in_vector / (size / 2);
            for (int k = 0; k < K; ++k) {
                const int code = first + channel < M ? codes[static_cast<ptrdiff_t>(first + channel) * K + k] : 0;
                uint8_t& field = fields[static_cast<ptrdiff_t>(k / 2) * width + place];
                field = static_cast<uint8_t>(field | (code + 2) << k % 2 * 2);
            }
        }
    }

    static constexpr StreamOrder order = {panel, size, 0, field_bits, fields, fill};

    static PackedWeight pack(const int8_t* codes, int M, int K, int bits) { return pack_panels(order, codes, M, K, bits); }

    static size_t scratch_bytes(int K) { return 64 + expanded_bytes(fields(panel, K), 4); }

    static const uint8_t* unpack(const PackedWeight& weight, int p, uint8_t* scratch) {
        const uint8_t* packed = weight.data.get() + weight.panel_bytes * static_cast<size_t>(p);
        const int width = panel_width(weight.M, weight.panel, size, p * weight.panel);
        expand_panel<Bytes>(packed, 64, fields(width, weight.K), 4, 0, scratch);
        return scratch;
    }

    // `rows` rows times `vectors` vectors of channels; lookups of the panel are `width` bytes apart.
    template <int rows, int vectors>
    static void tile(const uint8_t* a, ptrdiff_t pitch, const uint8_t* w, int width, int count, bool add, int32_t* out,
                     ptrdiff_t ld_out) {
        V pairs[rows][vectors], high[rows][vectors];
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) pairs[r][v] = high[r][v] = Bytes::zero();
        for (int left = count; left > 0; left -= run) {
            V sum[rows][vectors];
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
                for (int v = 0; v < vectors; ++v) sum[r][v] = Bytes::zero();
            for (int i = left < run ? left : run; i; --i, ++a, w += width) {
                V index[vectors];
#pragma GCC unroll 16
                for (int v = 0; v < vectors; ++v) index[v] = Bytes::load(w + size * v);
#pragma GCC unroll 16
                for (int r = 0; r < rows; ++r) {
                    const V table = Bytes::table(tables.bytes[0] + a[r * pitch]);
#pragma GCC unroll 16
                    for (int v = 0; v < vectors; ++v) Bytes::add_lookup(sum[r][v], table, index[v]);
                }
            }
#pragma GCC unroll 16
            for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
                for (int v = 0; v < vectors; ++v) {
                    pairs[r][v] = Bytes::plus_words(pairs[r][v], sum[r][v]);
                    high[r][v] = Bytes::plus_high(high[r][v], sum[r][v]);
                }
        }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r)
#pragma GCC unroll 16
            for (int v = 0; v < vectors; ++v) {
                alignas(64) uint16_t halves[2][size / 2];
                Bytes::store(reinterpret_cast<uint8_t*>(halves[0]), pairs[r][v]);
                Bytes::store(reinterpret_cast<uint8_t*>(halves[1]), high[r][v]);
                for (int i = 0; i < size / 2; ++i) {
                    const uint16_t low = static_cast<uint16_t>(halves[0][i] - (halves[1][i] << 8));
                    int32_t* place = out + r * ld_out + size * v + i;
                    place[0] = low - offset * count + (add ? place[0] : 0);
                    place[size / 2] = halves[1][i] - offset * count + (add ? place[size / 2] : 0);
                }
            }
    }

    template <int max_rows>
    static void sums(const uint8_t* a, ptrdiff_t pitch, int rows, const uint8_t* unpacked, int K, int32_t* out, ptrdiff_t ld_out) {
        int width;
        __builtin_memcpy(&width, unpacked, sizeof width);
        for (int channel = 0; channel < width; channel += 2 * size) {
            row_steps<max_rows>(rows, [&](auto step, int row) {
                for (int done = 0; done < lookups(K); done += block) {
                    const int left = lookups(K) - done;
                    (width - channel > size ? tile<step.value, 2> : tile<step.value, 1>)(
                        a + row * pitch + done, pitch, unpacked + 64 + static_cast<ptrdiff_t>(done) * width + channel, width,
                        left < block ? left : block, done > 0, out + row * ld_out + channel, ld_out);
                }
            });
        }
    }

    // max_rows: rows at a time.
    template <int max_rows>
    static constexpr GemmKernel kernel(const char* name, Isa isa) {
        return {name, isa, panel, max_rows, row_bytes, prepare, pack, scratch_bytes, unpack, sums<max_rows>};
    }
};

}  // namespace
}  // namespace qvit::cpu
