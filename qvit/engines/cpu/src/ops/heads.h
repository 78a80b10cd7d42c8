// q, k and v: rectify (IRM), quantize, and write the codes where attention reads them.
#pragma once

#include "epilogue.h"

namespace {

using qvit::cpu::HeadCodes;
using qvit::cpu::HeadLayout;

constexpr int kMaxHeadVectors = 512 / 4;  // a head is at most 512 wide

// Stored codes (plus a bias) of one head of one row.
template <class V, Sums::Form kForm>
inline void head_row(const Row<V, kForm>& y, const HeadCodes& h, int j0, int dim, int head, float row_inverse, float row_scale,
                     int32_t* out) {
    const float* gain = h.gain + static_cast<ptrdiff_t>(head) * h.ld;
    const float* shift = h.shift + static_cast<ptrdiff_t>(head) * h.ld;
    const float* scale = h.scale + static_cast<ptrdiff_t>(head) * h.ld;
    const auto low = V::set(h.low), high = V::set(h.high), post = V::set(h.post);
    const auto bias = V::iset(h.stored_bias);
    if (!h.rectify) {
        const auto own_inverse = V::set(row_inverse), own_scale = V::set(row_scale);
        for (int d = 0; d < dim; d += V::W) {
            const auto v = divided<V>(y(j0 + d), V::load(shift + d), V::mul(V::load(gain + d), own_inverse),
                                      V::mul(V::load(scale + d), own_scale));
            V::istore(out + d, V::iadd(V::to_int(V::min(V::max(V::add(v, post), low), high)), bias));
        }
        return;
    }
    float values[kMaxHeadVectors * 4 + qvit::cpu::kPad];
    for (int d = 0; d < dim; d += V::W) {
        V::store(values + d, y(j0 + d));
    }
    const Moments of = moments<V>(values, dim, h.eps);
    const auto mean = V::set(of.mean), rstd = V::set(of.rstd), own = V::set(row_inverse);
    for (int d = 0; d < dim; d += V::W) {
        const auto z = V::mul(V::sub(V::load(values + d), mean), rstd);
        const auto v = V::mul(V::fma(z, V::load(gain + d), V::load(shift + d)), own);
        V::istore(out + d, V::iadd(V::to_int(V::min(V::max(V::add(v, post), low), high)), bias));
    }
}

template <class V>
inline void write_q(const int32_t* codes, int token, int head, const HeadLayout& l) {
    uint8_t* to = l.q + (static_cast<ptrdiff_t>(token) * l.heads + head) * 4 * l.dim4;
    for (int d = 0; d < l.head_dim; d += V::W) {
        store_some<V>(to + d, V::iload(codes + d), l.head_dim - d);
    }
    memset(to + l.head_dim, 0, static_cast<size_t>(4 * l.dim4 - l.head_dim));
}

template <class V>
inline void write_k(const int32_t* codes, int token, int head, const HeadLayout& l) {
    alignas(64) uint8_t bytes[kMaxHeadVectors * 4 + 64];
    auto sum = V::iset(0);
    int d = 0;
    for (; d + V::W <= l.head_dim; d += V::W) {
        const auto c = V::iload(codes + d);
        sum = V::iadd(sum, c);
        V::store_bytes(bytes + d, c);
    }
    int32_t total = V::isum(sum);
    for (; d < l.head_dim; d++) {
        total += codes[d];
        bytes[d] = static_cast<uint8_t>(codes[d]);
    }
    for (; d < 4 * l.dim4; d++) {
        bytes[d] = 0;
    }
    int8_t* to = l.k + (static_cast<ptrdiff_t>(head) * l.dim4 * l.tokens_padded + token) * 4;
    for (int g = 0; g < l.dim4; g++, to += 4 * static_cast<ptrdiff_t>(l.tokens_padded)) {
        memcpy(to, bytes + 4 * g, 4);
    }
    const ptrdiff_t column = static_cast<ptrdiff_t>(head) * l.tokens_padded + token;
    l.k_sum[column] = l.k_sum_factor * (total + l.head_dim * l.k_code_bias);
    if (l.k_float) {
        float correction = 0.0f;
        for (int i = 0; i < l.head_dim; i++) {
            correction += static_cast<float>(codes[i] + l.k_code_bias) * l.q_offset[static_cast<ptrdiff_t>(head) * l.dim_padded + i];
        }
        l.k_float[column] = correction;
    }
}

// Four tokens' codes of one head (missing tokens: zeros), a word of four bytes a channel.
template <class V>
inline void write_v(const int32_t* codes, ptrdiff_t ld, int token, int head, const HeadLayout& l) {
    int8_t* to = l.v + ((static_cast<ptrdiff_t>(head) * (l.tokens_padded / 4) + token / 4) * l.dim_padded) * 4;
    for (int d = 0; d < l.head_dim; d += V::W) {
        auto w = V::low_byte(V::iload(codes + d));
        w = V::ior(w, V::template left<8>(V::low_byte(V::iload(codes + ld + d))));
        w = V::ior(w, V::template left<16>(V::low_byte(V::iload(codes + 2 * ld + d))));
        w = V::ior(w, V::template left<24>(V::iload(codes + 3 * ld + d)));
        V::istore(reinterpret_cast<int32_t*>(to) + d, w);
    }
}

template <class V, Sums::Form kForm>
void head_codes_of(const Tile& t, const Sums& s, int which, int first_head, const HeadCodes& h, const HeadLayout& l) {
    constexpr int kLd = kMaxHeadVectors * 4 + qvit::cpu::kPad;
    alignas(64) int32_t codes[4 * kLd];
    const int heads = t.cols / l.head_dim;
    for (int r = 0; r < t.rows; r++) {
        const Row<V, kForm> y(s, t, r);
        const int token = t.row0 + r;
        for (int i = 0; i < heads && which != 2; i++) {
            const int head = first_head + i;
            const ptrdiff_t at = static_cast<ptrdiff_t>(head) * l.tokens + token;
            head_row<V, kForm>(y, h, i * l.head_dim, l.head_dim, head, h.row_inverse ? h.row_inverse[at] : 1.0f,
                               h.row_inverse ? h.row_scale[at] : 1.0f, codes);
            if (which == 0) {
                write_q<V>(codes, token, head, l);
            } else {
                write_k<V>(codes, token, head, l);
            }
        }
    }
    for (int r = 0; r < t.rows && which == 2; r += 4) {
        for (int i = 0; i < heads; i++) {
            const int head = first_head + i;
            for (int n = 0; n < 4; n++) {
                if (r + n < t.rows) {
                    head_row<V, kForm>(Row<V, kForm>(s, t, r + n), h, i * l.head_dim, l.head_dim, head, 1.0f, 1.0f, codes + n * kLd);
                } else {
                    memset(codes + n * kLd, 0, sizeof(int32_t) * static_cast<size_t>(l.dim_padded));
                }
            }
            write_v<V>(codes, kLd, t.row0 + r, head, l);
        }
    }
}

template <class V>
void to_head_codes(const Tile& t, const Sums& s, int which, int first_head, const HeadCodes& h, const HeadLayout& l) {
    by_form(s, [&](auto form) { head_codes_of<V, decltype(form)::value>(t, s, which, first_head, h, l); });
}

}  // namespace
