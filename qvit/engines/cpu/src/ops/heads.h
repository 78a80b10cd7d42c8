// q, k and v: rectify (IRM), quantize, and write the codes where attention reads them.
#pragma once

#include "epilogue.h"

namespace {

using qvit::cpu::HeadCodes;
using qvit::cpu::HeadLayout;

constexpr int kMaxHead = 512;
constexpr int kLd = kMaxHead + qvit::cpu::kPad;

// The close calls of one rectified row of a head, again; `y` are its pre-activations, `values` what was rounded.
template <class Code>
inline void rectify_again(const HeadCodes& h, int head, int dim, const float* y, const float* values, float margin,
                          float row_scale, Code* codes) {
    const ExactMoments of = exact_moments(y, dim, h.eps);
    const ptrdiff_t at = static_cast<ptrdiff_t>(head) * h.ld;
    for (int d = 0; d < dim; d++) {
        if (is_close(values[d], margin)) {
            const float z = static_cast<float>((static_cast<double>(y[d]) - of.mean) * of.rstd);
            const float x = z * h.weight[at + d] + h.bias[at + d];
            const float scale = h.scale[at + d] * row_scale;
            codes[d] = static_cast<Code>(exact_code(x, h.half_row ? 0.5f * scale : h.offset[at + d], scale, h.low, h.high) +
                                         h.stored_bias);
        }
    }
}

template <class V>
inline void store_codes(int32_t* to, typename V::I codes) { V::istore(to, codes); }
template <class V>
inline void store_codes(uint8_t* to, typename V::I codes) { V::store_bytes(to, codes); }

// Codes of one head of four rows (plus the bias of stored codes), [4][ld], in whole vectors. Rows behind the tile's last repeat
// it. kVectors: vectors a head is wide where the compiler is to know it, so that they stay in registers; else 0.
template <class V, Sums::Form kForm, int kVectors, class Code>
inline void four_rows(const Tile& t, const Sums& s, const HeadCodes& h, int r, int j0, int dim, int head, int tokens,
                      Code* codes, ptrdiff_t ld) {
    const ptrdiff_t at = static_cast<ptrdiff_t>(head) * h.ld;
    const float *gain = h.gain + at, *shift = h.shift + at;
    const auto low = V::set(h.low), high = V::set(h.high);
    const auto bias = V::iset(h.stored_bias);
    const auto last = [&](int n) { return r + n < t.rows ? r + n : t.rows - 1; };
    const Row<V, kForm> rows[4] = {{s, t, last(0)}, {s, t, last(1)}, {s, t, last(2)}, {s, t, last(3)}};
    const auto row_constant = [&](const float* of, int n) {
        return of ? of[static_cast<ptrdiff_t>(head) * tokens + t.row0 + last(n)] : 1.0f;
    };
    if (!h.rectify) {
        for (int n = 0; n < 4; n++) {
            const float row_scale = row_constant(h.row_scale, n);
            const auto own_inverse = V::set(row_constant(h.row_inverse, n)), own_scale = V::set(row_scale);
            for (int d = 0; d < dim; d += V::W) {
                const auto offset = h.half_row ? V::set(0.5f * row_scale) : V::load(h.offset + at + d);
                const auto v = divided<V>(rows[n](j0 + d), offset, V::mul(V::load(gain + d), own_inverse),
                                          V::mul(V::load(h.scale + at + d), own_scale));
                store_codes<V>(codes + n * ld + d, V::iadd(V::to_int(V::min(V::max(v, low), high)), bias));
            }
        }
        return;
    }
    const auto half = V::set(h.half_row ? -0.5f : 0.0f);
    const auto value = [&](typename V::F z, int d, typename V::F own_inverse) {
        const auto v = V::fma(z, V::load(gain + d), V::load(shift + d));
        return h.row_inverse ? V::add(V::mul(v, own_inverse), half) : v;
    };
    auto far = V::set(0.0f);
    const auto write = [&](int n, int d, typename V::F v) {
        store_codes<V>(codes + n * ld + d, V::iadd(V::to_int(clamped<V>(v, low, high, far)), bias));
    };
    float mean[4], rstd[4];
    if constexpr (kVectors > 0) {
        typename V::F y[4][kVectors], sum[4], square[4];
        float totals[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; i++) {
                y[n][i] = rows[n](j0 + i * V::W);
            }
            sum[n] = y[n][0];
#pragma GCC unroll 8
            for (int i = 1; i < kVectors; i++) {
                sum[n] = V::add(sum[n], y[n][i]);
            }
        }
        V::sum4(sum[0], sum[1], sum[2], sum[3], totals);
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
            mean[n] = totals[n] / static_cast<float>(dim);
            const auto m = V::set(mean[n]);
            square[n] = V::set(0.0f);
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; i++) {
                y[n][i] = V::sub(y[n][i], m);
                square[n] = V::fma(y[n][i], y[n][i], square[n]);
            }
        }
        V::sum4(square[0], square[1], square[2], square[3], totals);
        typename V::F own[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
            rstd[n] = 1.0f / sqrtf(totals[n] / static_cast<float>(dim) + static_cast<float>(h.eps));
            own[n] = V::set(rstd[n]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; i++) {
            const auto g = V::load(gain + i * V::W), b = V::load(shift + i * V::W);
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++) {
                auto v = V::fma(V::mul(y[n][i], own[n]), g, b);
                if (h.row_inverse) {
                    v = V::add(V::mul(v, V::set(row_constant(h.row_inverse, n))), half);
                }
                write(n, i * V::W, v);
            }
        }
    } else {
        float y[kLd];
        for (int n = 0; n < 4; n++) {
            for (int d = 0; d < dim; d += V::W) {
                V::store(y + d, rows[n](j0 + d));
            }
            const Moments of = moments<V>(y, dim, static_cast<float>(h.eps));
            mean[n] = of.mean;
            rstd[n] = of.rstd;
            const auto m = V::set(of.mean), own = V::set(of.rstd), own_inverse = V::set(row_constant(h.row_inverse, n));
            for (int d = 0; d < dim; d += V::W) {
                write(n, d, value(V::mul(V::sub(V::load(y + d), m), own), d, own_inverse));
            }
        }
    }
    float margins[4], most = 0.0f;
    for (int n = 0; n < 4; n++) {
        margins[n] = row_margin(h.margin, mean[n], rstd[n]);
        most = margins[n] > most ? margins[n] : most;
    }
    if (close_call<V>(far, most)) {
        float y[kLd], values[kLd];
        for (int n = 0; n < 4; n++) {
            const auto m = V::set(mean[n]), own = V::set(rstd[n]), own_inverse = V::set(row_constant(h.row_inverse, n));
            for (int d = 0; d < dim; d += V::W) {
                const auto x = rows[n](j0 + d);
                V::store(y + d, x);
                V::store(values + d, value(V::mul(V::sub(x, m), own), d, own_inverse));
            }
            rectify_again(h, head, dim, y, values, margins[n], row_constant(h.row_scale, n), codes + n * ld);
        }
    }
}

template <class V>
inline void write_q(const int32_t* codes, int token, int head, const HeadLayout& l) {
    const int width = 4 * l.dim4;
    for (int n = 0; n < 4; n++) {
        uint8_t* to = l.q + (static_cast<ptrdiff_t>(token + n) * l.heads + head) * width;
        for (int d = 0; d < l.head_dim; d += V::W) {
            store_some<V>(to + d, V::iload(codes + n * kLd + d), l.head_dim - d);
        }
        memset(to + l.head_dim, 0, static_cast<size_t>(width - l.head_dim));
    }
}

// Four tokens of a group of four channels lie together: 16 bytes. bytes: [4][kBytes].
constexpr int kBytes = kMaxHead + 64;

template <class V>
inline void write_k_bytes(const uint8_t* bytes, int token, int head, const HeadLayout& l) {
    const ptrdiff_t step = 4 * static_cast<ptrdiff_t>(l.tokens_padded);
    int8_t* to = l.k + static_cast<ptrdiff_t>(head) * l.dim4 * step + 4 * token;
    for (int g = 0; g < l.dim4;) {
        const uint8_t* from = bytes + 4 * g;
        if (l.dim4 - g >= V::W) {
            V::store_transposed(from, from + kBytes, from + 2 * kBytes, from + 3 * kBytes, to + g * step, step);
            g += V::W;
            continue;
        }
        for (int n = 0; n < 4; n++) {
            memcpy(to + g * step + 4 * n, from + n * kBytes, 4);
        }
        g++;
    }
}

template <class V>
inline void write_k(const int32_t* codes, int token, int head, const HeadLayout& l) {
    alignas(64) uint8_t bytes[4 * kBytes];
    for (int n = 0; n < 4; n++) {
        for (int d = 0; d < l.head_dim; d += V::W) {
            V::store_bytes(bytes + n * kBytes + d, V::iload(codes + n * kLd + d));
        }
        memset(bytes + n * kBytes + l.head_dim, 0, static_cast<size_t>(4 * l.dim4 - l.head_dim));
    }
    write_k_bytes<V>(bytes, token, head, l);
}

// A word of four tokens' bytes a channel.
template <class V>
inline void write_v(const int32_t* codes, int token, int head, const HeadLayout& l) {
    int8_t* to = l.v + ((static_cast<ptrdiff_t>(head) * (l.tokens_padded / 4) + token / 4) * l.dim_padded) * 4;
    for (int d = 0; d < l.head_dim; d += V::W) {
        auto w = V::low_byte(V::iload(codes + d));
        w = V::ior(w, V::template left<8>(V::low_byte(V::iload(codes + kLd + d))));
        w = V::ior(w, V::template left<16>(V::low_byte(V::iload(codes + 2 * kLd + d))));
        w = V::ior(w, V::template left<24>(V::iload(codes + 3 * kLd + d)));
        V::istore(reinterpret_cast<int32_t*>(to) + d, w);
    }
}

// kDim: the width of a head where the compiler is to know it, else 0.
template <class V, Sums::Form kForm, int kDim>
void head_codes_of(const Tile& t, const Sums& s, int which, int first_head, const HeadCodes& h, const HeadLayout& l) {
    alignas(64) int32_t codes[4 * kLd];
    const int D = kDim ? kDim : l.head_dim;
    for (int i = 0; i < t.cols / D; i++) {
        const int head = first_head + i;
        for (int r = 0; r < t.rows; r += 4) {
            const int token = t.row0 + r;
            if (kDim && which == 0) {
                const ptrdiff_t ld = kDim * static_cast<ptrdiff_t>(l.heads);
                four_rows<V, kForm, kDim / V::W>(t, s, h, r, i * D, D, head, l.tokens, l.q + token * ld + kDim * head, ld);
            } else if (kDim && which == 1) {
                alignas(64) uint8_t bytes[4 * kBytes];
                four_rows<V, kForm, kDim / V::W>(t, s, h, r, i * D, D, head, l.tokens, bytes, kBytes);
                write_k_bytes<V>(bytes, token, head, l);
            } else {
                four_rows<V, kForm, 0>(t, s, h, r, i * D, D, head, l.tokens, codes, kLd);
                if (which == 0) {
                    write_q<V>(codes, token, head, l);
                } else if (which == 1) {
                    write_k<V>(codes, token, head, l);
                } else {
                    write_v<V>(codes, token, head, l);
                }
            }
        }
    }
}

template <class V>
void to_head_codes(const Tile& t, const Sums& s, int which, int first_head, const HeadCodes& h, const HeadLayout& l) {
    by_form(s, [&](auto form) {
        constexpr Sums::Form kForm = decltype(form)::value;
        if (l.head_dim == 64) {
            head_codes_of<V, kForm, 64>(t, s, which, first_head, h, l);
        } else if (l.head_dim == 32) {
            head_codes_of<V, kForm, 32>(t, s, which, first_head, h, l);
        } else {
            head_codes_of<V, kForm, 0>(t, s, which, first_head, h, l);
        }
    });
}

}  // namespace
