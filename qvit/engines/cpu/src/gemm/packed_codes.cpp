#include "packed_codes.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace qvit::cpu {

void AlignedDelete::operator()(uint8_t* bytes) const { std::free(bytes); }

AlignedBytes aligned_bytes(size_t size) {
    size_t whole = round_up(size ? size : 1, 64);
    void* bytes = std::aligned_alloc(64, whole);
    if (!bytes) throw std::bad_alloc();
    std::memset(bytes, 0, whole);
    return AlignedBytes(static_cast<uint8_t*>(bytes));
}

namespace {

void pack_block(const uint8_t* c, int bits, uint8_t* v) {
    for (int j = 0; j < 64; ++j) {
        auto field = [&](int n) { return static_cast<unsigned>(c[n * 64 + j]); };
        auto put = [&](int i, unsigned byte) { v[i * 64 + j] = static_cast<uint8_t>(byte); };
        if (bits == 8) {
            put(0, field(0));
        } else if (bits == 4) {
            put(0, field(0) | field(1) << 4);
        } else if (bits == 2) {
            put(0, field(0) | field(1) << 2 | field(2) << 4 | field(3) << 6);
        } else if (bits == 6) {
            for (int i = 0; i < 3; ++i) put(i, field(i) | (field(3) >> 2 * i & 3) << 6);
        } else {
            const unsigned top[3] = {field(6) & 3, field(7) & 3, field(6) >> 2 | field(7) >> 2 << 1};
            for (int i = 0; i < 3; ++i) put(i, field(2 * i) | field(2 * i + 1) << 3 | top[i] << 6);
        }
    }
}

void expand_block(const uint8_t* v, int bits, uint8_t* c) {
    for (int j = 0; j < 64; ++j) {
        auto byte = [&](int i) { return static_cast<unsigned>(v[i * 64 + j]); };
        auto put = [&](int n, unsigned field) { c[n * 64 + j] = static_cast<uint8_t>(field); };
        if (bits == 8) {
            put(0, byte(0));
        } else if (bits == 4) {
            for (int n = 0; n < 2; ++n) put(n, byte(0) >> 4 * n & 15);
        } else if (bits == 2) {
            for (int n = 0; n < 4; ++n) put(n, byte(0) >> 2 * n & 3);
        } else if (bits == 6) {
            for (int n = 0; n < 3; ++n) put(n, byte(n) & 63);
            put(3, byte(0) >> 6 | byte(1) >> 6 << 2 | byte(2) >> 6 << 4);
        } else {
            for (int n = 0; n < 6; ++n) put(n, byte(n / 2) >> 3 * (n % 2) & 7);
            for (int n = 6; n < 8; ++n) put(n, byte(n - 6) >> 6 | (byte(2) >> n & 1) << 2);
        }
    }
}

int quad_bits(int bits) { return bits; }

template <int step>
size_t quad_fields(int width, int K) {
    return round_up(static_cast<size_t>(K), step) * static_cast<size_t>(width);
}

template <bool with_terms>
void fill_quads(const int8_t* codes, int M, int K, int bits, int first, int width, uint8_t* fields, int32_t* terms) {
    const int bias = bits == 8 ? 0 : 1 << (bits - 1);
    const int padded = static_cast<int>(round_up(static_cast<size_t>(K), with_terms ? 8 : 4));
    for (int channel = 0; channel < width; ++channel) {
        auto biased = [&](int k) {
            int code = k < K && first + channel < M ? codes[static_cast<size_t>(first + channel) * K + k] : 0;
            return code + bias;
        };
        for (int k = 0; k < padded; ++k)
            fields[(static_cast<size_t>(k / 4) * width + channel) * 4 + k % 4] = static_cast<uint8_t>(biased(k));
        if constexpr (with_terms)
            for (int k = 0; k < padded; k += 8)
                for (int i = k; i < k + 4; ++i) terms[channel] += biased(i) * biased(i + 4);
    }
}

}  // namespace

void pack_stream(const uint8_t* fields, size_t count, int bits, uint8_t* packed) {
    for (; count; count -= block_fields(bits), fields += block_fields(bits), packed += block_bytes(bits)) {
        if (count < block_fields(bits)) {
            uint8_t last[512] = {};
            std::memcpy(last, fields, count);
            pack_block(last, bits, packed);
            return;
        }
        pack_block(fields, bits, packed);
    }
}

void expand_stream(const uint8_t* packed, size_t count, int bits, uint8_t* fields) {
    const size_t blocks = expanded_bytes(count, bits) / block_fields(bits);
    for (size_t b = 0; b < blocks; ++b) expand_block(packed + b * block_bytes(bits), bits, fields + b * block_fields(bits));
}

const StreamOrder quad_order = {64, 16, 0, quad_bits, quad_fields<4>, fill_quads<false>};
const StreamOrder quad_pair_order = {64, 16, 1, quad_bits, quad_fields<8>, fill_quads<true>};

PackedWeight pack_panels(const StreamOrder& order, const int8_t* codes, int M, int K, int bits) {
    if (M < 1 || K < 1 || K > 65536 || !(bits == 2 || bits == 3 || bits == 4 || bits == 8))
        throw std::invalid_argument("cannot pack a weight [" + std::to_string(M) + ", " + std::to_string(K) + "] of " +
                                    std::to_string(bits) + "-bit codes");
    const int field_bits = order.bits(bits);
    auto bytes_of = [&](int width) {
        return header_bytes(width, order.terms) + packed_bytes(order.fields(width, K), field_bits);
    };
    PackedWeight weight;
    weight.M = M;
    weight.K = K;
    weight.bits = bits;
    weight.panel = order.panel;
    weight.panel_bytes = bytes_of(order.panel);
    const int last = (weight.panels() - 1) * order.panel;
    weight.bytes =
        weight.panel_bytes * static_cast<size_t>(weight.panels() - 1) + bytes_of(panel_width(M, order.panel, order.step, last));
    weight.data = aligned_bytes(weight.bytes);
    std::vector<uint8_t> fields;
    for (int first = 0; first < M; first += order.panel) {
        const int32_t width = panel_width(M, order.panel, order.step, first);
        uint8_t* out = weight.data.get() + weight.panel_bytes * static_cast<size_t>(first / order.panel);
        std::memcpy(out, &width, sizeof width);
        fields.assign(order.fields(width, K), 0);
        std::vector<int32_t> terms(static_cast<size_t>(width) * order.terms);
        order.fill(codes, M, K, bits, first, width, fields.data(), terms.data());
        if (order.terms) std::memcpy(out + 64, terms.data(), terms.size() * sizeof(int32_t));
        pack_stream(fields.data(), fields.size(), field_bits, out + header_bytes(width, order.terms));
    }
    return weight;
}

}  // namespace qvit::cpu
