// Scores, softmax, codes of the map, values and codes of proj's input, for a few query rows of one head, all in L1.
#pragma once

#include <float.h>

#include "heads.h"
#include "thresholds.h"

namespace {

using qvit::cpu::Attention;
using qvit::cpu::kQueryRows;

template <class V>
inline typename V::I four_codes(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, 4);
    return V::iset(word);
}

// out[r][c] = sum over g of dot4(a[r][4g..], b[g][c]) for kRows rows and kVectors vectors of columns.
// Not inlined: GCC 12 spills the accumulators where it has more to keep in registers.
template <class V, bool kWide, int kRows, int kVectors>
__attribute__((noinline)) void product_tile(const uint8_t* a, ptrdiff_t lda, const int8_t* b, ptrdiff_t ldb, int groups,
                                            int32_t* out, ptrdiff_t ld_out) {
    typename V::I acc[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; c++) {
            acc[r][c] = V::iset(0);
        }
    }
    for (int g = 0; g < groups; g++, a += 4, b += ldb) {
        typename V::I columns[kVectors];
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; c++) {
            columns[c] = V::iload(reinterpret_cast<const int32_t*>(b) + c * V::W);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++) {
            const auto x = four_codes<V>(a + r * lda);
#pragma GCC unroll 8
            for (int c = 0; c < kVectors; c++) {
                acc[r][c] = V::template dot4<kWide>(acc[r][c], x, columns[c]);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; c++) {
            V::istore(out + r * ld_out + c * V::W, acc[r][c]);
        }
    }
}

template <class V, bool kWide, int kRows>
inline void product_rows(const uint8_t* a, ptrdiff_t lda, const int8_t* b, int columns, int groups, int32_t* out,
                         ptrdiff_t ld_out) {
    constexpr int kVectors = V::W == 16 ? 4 : 2;
    int c = 0;
    for (; c + kVectors * V::W <= columns; c += kVectors * V::W) {
        product_tile<V, kWide, kRows, kVectors>(a, lda, b + 4 * c, 4 * static_cast<ptrdiff_t>(columns), groups, out + c, ld_out);
    }
    for (; c < columns; c += V::W) {
        product_tile<V, kWide, kRows, 1>(a, lda, b + 4 * c, 4 * static_cast<ptrdiff_t>(columns), groups, out + c, ld_out);
    }
}

// a: uint8 [rows][lda], b: int8 [groups][columns][4], columns a multiple of 16 -> int32 [rows][ld_out].
template <class V, bool kWide>
inline void product(const uint8_t* a, ptrdiff_t lda, int rows, const int8_t* b, int columns, int groups, int32_t* out,
                    ptrdiff_t ld_out) {
    constexpr int kRows = V::W == 16 ? 6 : 4;
    int r = 0;
    for (; r + kRows <= rows; r += kRows) {
        product_rows<V, kWide, kRows>(a + r * lda, lda, b, columns, groups, out + r * ld_out, ld_out);
    }
    for (; r + 2 <= rows; r += 2) {
        product_rows<V, kWide, 2>(a + r * lda, lda, b, columns, groups, out + r * ld_out, ld_out);
    }
    for (; r < rows; r++) {
        product_rows<V, kWide, 1>(a + r * lda, lda, b, columns, groups, out + r * ld_out, ld_out);
    }
}

constexpr float kLog2e = 1.44269504088896341f;

// Stored codes of exponentials whose lanes behind the tokens are 0; returns their sum. `far`: see `clamped`.
template <class V>
inline int32_t map_codes(const float* exponentials, int padded, float factor, float high, uint8_t* codes, typename V::F& far) {
    const auto f = V::set(factor), top = V::set(high);
    auto sum = V::iset(0);
    for (int m = 0; m < padded; m += V::W) {
        const auto v = V::min(V::mul(V::load(exponentials + m), f), top);
        far = V::max_abs(far, V::off_grid(v));
        const auto c = V::to_int(v);
        sum = V::iadd(sum, c);
        V::store_bytes(codes + m, c);
    }
    return V::isum(sum);
}

// `far` was compared with the margin of the largest code; whether a value is within its own, relative * (value + 1).
template <class V>
inline bool any_close(const float* exponentials, int padded, float inverse, float relative, float high) {
    const auto f = V::set(inverse), top = V::set(high), by = V::set(relative);
    auto far = V::set(0.0f);
    for (int m = 0; m < padded; m += V::W) {
        const auto v = V::min(V::mul(V::load(exponentials + m), f), top);
        far = V::max(far, V::add(V::abs(V::off_grid(v)), V::fma(v, by, by)));
    }
    return V::largest(far) > 0.5f;
}

// The scores of one row as float32, in the reference engine's operations.
struct ScoreRow {
    const int32_t* column;
    const float* k_scale;
    const float* k_float;  // or null
    const float* bias;     // or null
    const float* mask;     // or null
    float factor, q_scale;
    int32_t row_term;
    bool doubled;

    float operator()(int32_t sum, int m) const {
        const int32_t t = (doubled ? 2 * sum : sum) + column[m] + row_term;
        float score = static_cast<float>(t) * (q_scale * k_scale[m]);
        score = k_float ? score + k_float[m] * (k_scale[m] * factor) : score;
        score = bias ? score + bias[m] : score;
        return mask ? score + mask[m] : score;
    }
};

// The codes of a row of the map that are close calls, again; `sums` are the products of the codes of q and k.
inline int32_t map_codes_again(const ScoreRow& score, const int32_t* sums, const float* exponentials, float inverse, float p_scale,
                               float high, float margin, int tokens, uint8_t* codes) {
    float most = -FLT_MAX;
    for (int m = 0; m < tokens; m++) {
        const float s = score(sums[m], m);
        most = s > most ? s : most;
    }
    double total = 0.0;
    for (int m = 0; m < tokens; m++) {
        total += exp(static_cast<double>(score(sums[m], m)) - static_cast<double>(most));
    }
    int32_t sum = 0;
    for (int m = 0; m < tokens; m++) {
        if (is_close(exponentials[m] * inverse, margin)) {
            const double e = exp(static_cast<double>(score(sums[m], m)) - static_cast<double>(most));
            codes[m] = static_cast<uint8_t>(exact_code(static_cast<float>(e / total), 0.0f, p_scale, 0.0f, high));
        }
        sum += codes[m];
    }
    return sum;
}

struct Exponentials {
    float total, top;  // their sum; the largest score, roughly
};

// One scale of k a head and no float correction, and scores that are known to be small (`Attention::bounded`): no shift is
// needed to keep exp within float32.
template <class V>
inline Exponentials exponentials_bounded(int32_t* row, const int32_t* column, int tokens, int padded, bool doubled, float scale) {
    const auto factor = V::set(scale * kLog2e);
    auto total = V::set(0.0f), top = V::set(0.0f);
    float* out = reinterpret_cast<float*>(row);
    const auto exponential = [&](int m) {
        const auto sum = V::iload(row + m);
        const auto x = V::mul(V::to_float(V::iadd(doubled ? V::iadd(sum, sum) : sum, V::iload(column + m))), factor);
        top = V::max_abs(top, x);
        return exp2_of<V>(x);
    };
    int m = 0;
    for (; m + V::W <= tokens; m += V::W) {
        const auto e = exponential(m);
        V::store(out + m, e);
        total = V::add(total, e);
    }
    for (; m < padded; m += V::W) {
        const auto e = tokens > m ? V::first(exponential(m), tokens - m) : V::set(0.0f);
        V::store(out + m, e);
        total = V::add(total, e);
    }
    return {V::sum(total), V::largest(V::abs(top))};
}

// One scale of k a head and no float correction: the largest score is found, and taken off, in whole numbers.
template <class V>
inline Exponentials exponentials_uniform(int32_t* row, const int32_t* column, int tokens, int padded, bool doubled, float scale) {
    auto largest = V::iset(INT32_MIN);
    int m = 0;
    const int whole = tokens / V::W * V::W;
    for (; m < whole; m += V::W) {
        auto t = V::iload(row + m);
        t = V::iadd(doubled ? V::iadd(t, t) : t, V::iload(column + m));
        V::istore(row + m, t);
        largest = V::imax(largest, t);
    }
    int32_t most = V::ilargest(largest);
    for (; m < tokens; m++) {
        row[m] = (doubled ? 2 * row[m] : row[m]) + column[m];
        most = row[m] > most ? row[m] : most;
    }
    const auto top = V::iset(most);
    const auto factor = V::set(scale * kLog2e);
    auto total = V::set(0.0f);
    float* out = reinterpret_cast<float*>(row);
    for (m = 0; m < whole; m += V::W) {
        const auto e = exp2_of<V>(V::mul(V::to_float(V::isub(V::iload(row + m), top)), factor));
        V::store(out + m, e);
        total = V::add(total, e);
    }
    for (; m < padded; m += V::W) {
        const int n = tokens - m;
        auto e = V::set(0.0f);
        if (n > 0) {
            const auto below = V::imin(V::isub(V::iload(row + m), top), V::iset(0));
            e = V::first(exp2_of<V>(V::mul(V::to_float(below), factor)), n < V::W ? n : V::W);
        }
        V::store(out + m, e);
        total = V::add(total, e);
    }
    return {V::sum(total), static_cast<float>(most) * scale};
}

// One scale of k a head and no float correction, with the bias and the mask of a window. `top` is the largest magnitude without
// the mask.
template <class V, bool kBounded>
inline Exponentials exponentials_placed(int32_t* row, const ScoreRow& score, int tokens, int padded, float scale) {
    const auto factor = V::set(scale), log2e = V::set(kLog2e);
    auto total = V::set(0.0f), top = V::set(0.0f), largest = V::set(-FLT_MAX);
    float* out = reinterpret_cast<float*>(row);
    float most = -FLT_MAX;
    for (int m = 0; m < padded; m += V::W) {
        const auto sum = V::iload(row + m);
        auto s = V::to_float(V::iadd(score.doubled ? V::iadd(sum, sum) : sum, V::iload(score.column + m)));
        s = V::add(V::mul(s, factor), V::load(score.bias + m));
        const int n = tokens - m;
        s = n >= V::W ? s : V::first(s, n > 0 ? n : 0);
        top = V::max_abs(top, s);
        if (score.mask) {
            s = V::add(s, V::load(score.mask + m));
        }
        if constexpr (kBounded) {
            const auto e = exp2_of<V>(V::mul(s, log2e));
            const auto kept = n >= V::W ? e : V::first(e, n > 0 ? n : 0);
            V::store(out + m, kept);
            total = V::add(total, kept);
        } else {
            V::store(out + m, s);
            if (n >= V::W) {
                largest = V::max(largest, s);
            }
            for (int i = m; n < V::W && i < tokens; i++) {
                most = out[i] > most ? out[i] : most;
            }
        }
    }
    if constexpr (!kBounded) {
        const float whole = V::largest(largest);
        const auto shift = V::set(whole > most ? whole : most);
        for (int m = 0; m < padded; m += V::W) {
            const int n = tokens - m;
            const auto x = V::min(V::mul(V::sub(V::load(out + m), shift), log2e), V::set(0.0f));
            const auto e = V::first(exp2_of<V>(x), n < 0 ? 0 : n < V::W ? n : V::W);
            V::store(out + m, e);
            total = V::add(total, e);
        }
    }
    return {V::sum(total), V::largest(V::abs(top))};
}

template <class V>
inline Exponentials exponentials_general(int32_t* row, const ScoreRow& score, int tokens, int padded) {
    float* out = reinterpret_cast<float*>(row);
    float most = -FLT_MAX;
    for (int m = 0; m < tokens; m++) {
        const float s = score(row[m], m);
        out[m] = s;
        most = s > most ? s : most;
    }
    const auto top = V::set(most), log2e = V::set(kLog2e);
    auto total = V::set(0.0f);
    for (int m = 0; m < padded; m += V::W) {
        const int n = tokens - m;
        auto e = V::set(0.0f);
        if (n > 0) {
            const auto x = V::first(V::load(out + m), n < V::W ? n : V::W);
            e = V::first(exp2_of<V>(V::min(V::mul(V::sub(x, top), log2e), V::set(0.0f))), n < V::W ? n : V::W);
        }
        V::store(out + m, e);
        total = V::add(total, e);
    }
    return {V::sum(total), most};
}

// The whole-number correction of each column of scores: factor * (sum of the key's codes).
template <class V>
inline void column_terms(const HeadLayout& l, const int8_t* k, int32_t* out) {
    const auto ones = V::iset(0x01010101), bias = V::iset(l.head_dim * l.k_code_bias);
    for (int m = 0; m < l.tokens_padded; m += V::W) {
        auto sum = bias;
        for (int g = 0; g < l.dim4; g++) {
            sum = V::template dot4<false>(
                sum, ones, V::iload(reinterpret_cast<const int32_t*>(k + (static_cast<ptrdiff_t>(g) * l.tokens_padded + m) * 4)));
        }
        V::istore(out + m, V::imul(sum, V::iset(l.k_sum_factor)));
    }
}

// Its float part where q has a learned offset: sum_d offset_q[d] * code_k[d].
inline void float_column_terms(const HeadLayout& l, const int8_t* k, const float* q_offset, float* out) {
    for (int m = 0; m < l.tokens; m++) {
        double sum = 0.0;
        for (int d = 0; d < l.head_dim; d++) {
            const int code = k[(static_cast<ptrdiff_t>(d / 4) * l.tokens_padded + m) * 4 + d % 4] + l.k_code_bias;
            sum += static_cast<double>(q_offset[d]) * code;
        }
        out[m] = static_cast<float>(sum);
    }
}

inline int32_t byte_sum(const uint8_t* p, int n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) {
        sum += p[i];
    }
    return sum;
}

template <class V, bool kWideQ, bool kWideP>
void attention_of(const Attention& a, int head, int row0, int rows, uint8_t* out, ptrdiff_t ld_out, void* scratch,
                  uint8_t* map) {
    const HeadLayout& l = a.layout;
    const int padded = l.tokens_padded;
    int32_t* scores = static_cast<int32_t*>(scratch);
    int32_t* values = scores + static_cast<ptrdiff_t>(kQueryRows) * padded;
    int32_t* row_sums = values + static_cast<ptrdiff_t>(kQueryRows) * l.dim_padded;
    int32_t* sums = row_sums + kQueryRows;
    int32_t* column = sums + padded;
    float* k_float = reinterpret_cast<float*>(column + padded);
    uint8_t* codes = reinterpret_cast<uint8_t*>(k_float + padded);
    const int8_t* k = l.k + static_cast<ptrdiff_t>(head) * l.dim4 * padded * 4;
    const int8_t* v = l.v + static_cast<ptrdiff_t>(head) * padded * l.dim_padded;
    const float* k_scale = a.k_scale + static_cast<ptrdiff_t>(head) * padded;
    const float* q_scale = a.q_scale + static_cast<ptrdiff_t>(head) * l.tokens;
    const float* p_scale = a.p_scale + static_cast<ptrdiff_t>(head) * l.tokens;
    const float* v_scale = a.v_scale + static_cast<ptrdiff_t>(head) * l.dim_padded;
    const float* v_offset = a.v_offset + static_cast<ptrdiff_t>(head) * l.dim_padded;
    column_terms<V>(l, k, column);
    if (l.q_offset) {
        float_column_terms(l, k, l.q_offset + static_cast<ptrdiff_t>(head) * l.dim_padded, k_float);
    }
    const ptrdiff_t ldq = static_cast<ptrdiff_t>(l.heads) * 4 * l.dim4;
    for (int r0 = 0; r0 < rows; r0 += kQueryRows) {
        const int count = rows - r0 < kQueryRows ? rows - r0 : kQueryRows;
        const int token0 = row0 + r0;
        const uint8_t* q = l.q + token0 * ldq + static_cast<ptrdiff_t>(head) * 4 * l.dim4;
        product<V, kWideQ>(q, ldq, count, k, padded, l.dim4, scores, padded);
        for (int r = 0; r < count; r++) {
            const int token = token0 + r;
            int32_t* row = scores + static_cast<ptrdiff_t>(r) * padded;
            const ScoreRow score{column,
                                 k_scale,
                                 l.q_offset ? k_float : nullptr,
                                 a.bias ? a.bias + static_cast<ptrdiff_t>(token) * padded : nullptr,
                                 a.mask ? a.mask + static_cast<ptrdiff_t>(a.region[token]) * padded : nullptr,
                                 a.factor,
                                 q_scale[token],
                                 a.row_bias ? a.row_bias * byte_sum(q + r * ldq, l.head_dim) : 0,
                                 a.doubled};
            const float uniform = q_scale[token] * k_scale[0];
            const Exponentials e = !a.k_uniform ? exponentials_general<V>(row, score, l.tokens, padded)
                                   : a.bias     ? (a.bounded ? exponentials_placed<V, true>(row, score, l.tokens, padded, uniform)
                                                             : exponentials_placed<V, false>(row, score, l.tokens, padded, uniform))
                                   : a.bounded  ? exponentials_bounded<V>(row, column, l.tokens, padded, a.doubled, uniform)
                                                : exponentials_uniform<V>(row, column, l.tokens, padded, a.doubled, uniform);
            const float* exponentials = reinterpret_cast<float*>(row);
            const float inverse = 1.0f / (e.total * p_scale[token]);
            // Scores are rounded to float32 by definition: the larger they are, the coarser.
            const float top = fabsf(e.top) + (a.k_uniform ? fabsf(static_cast<float>(score.row_term) * uniform) : 0.0f);
            float margin = a.margin * (1.0f + 0.1f * top);
            if (a.bias) {
                // They were rounded once more, behind the bias, and perhaps again behind the mask. That one is coarse, but counts
                // only where a key outside the region is not negligible, and then some score is far above those inside.
                margin = a.margin * (1.0f + 0.3f * (top + a.most_bias + (a.mask && top > 20.0f ? 100.0f : 0.0f)));
            }
            uint8_t* row_codes = codes + static_cast<ptrdiff_t>(r) * padded;
            auto far = V::set(0.0f);
            row_sums[r] = map_codes<V>(exponentials, padded, inverse, a.p_high, row_codes, far);
            if (close_call<V>(far, margin) && any_close<V>(exponentials, padded, inverse, margin / (a.p_high + 1.0f), a.p_high)) {
                product<V, kWideQ>(q + r * ldq, ldq, 1, k, padded, l.dim4, sums, padded);
                row_sums[r] = map_codes_again(score, sums, exponentials, inverse, p_scale[token], a.p_high, margin, l.tokens,
                                              row_codes);
            }
            if (map) {
                memcpy(map + static_cast<ptrdiff_t>(r0 + r) * l.tokens, codes + static_cast<ptrdiff_t>(r) * padded,
                       static_cast<size_t>(l.tokens));
            }
        }
        product<V, kWideP>(codes, padded, count, v, l.dim_padded, padded / 4, values, l.dim_padded);
        for (int r = 0; r < count; r++) {
            const int token = token0 + r;
            const int32_t rowsum = row_sums[r];
            const auto own = V::set(p_scale[token]), row_float = V::set(static_cast<float>(rowsum));
            const auto row_term = V::iset(a.v_row * rowsum);
            const float row_inverse = a.out.row_inverse ? a.out.row_inverse[token] : 1.0f;
            const float row_scale = a.out.row_inverse ? a.out.row_scale[token] : 1.0f;
            uint8_t* to = out + (r0 + r) * ld_out + static_cast<ptrdiff_t>(head) * l.head_dim;
            for (int d = 0; d < l.head_dim; d += V::W) {
                auto t = V::iload(values + static_cast<ptrdiff_t>(r) * l.dim_padded + d);
                t = V::iadd(a.v_mul == 2 ? V::iadd(t, t) : t, row_term);
                auto x = V::mul(V::to_float(t), V::mul(own, V::load(v_scale + d)));
                x = V::add(x, V::mul(row_float, V::mul(own, V::load(v_offset + d))));
                const auto c = quantized<V>(a.out, x, head * l.head_dim + d, row_inverse, row_scale);
                store_some<V>(to + d, c, l.head_dim - d);
            }
        }
    }
}

template <class V>
void attention(const Attention& a, int head, int row0, int rows, uint8_t* out, ptrdiff_t ld_out, void* scratch, uint8_t* map) {
    if (a.wide_q) {
        if (a.wide_p) {
            attention_of<V, true, true>(a, head, row0, rows, out, ld_out, scratch, map);
        } else {
            attention_of<V, true, false>(a, head, row0, rows, out, ld_out, scratch, map);
        }
    } else if (a.wide_p) {
        attention_of<V, false, true>(a, head, row0, rows, out, ld_out, scratch, map);
    } else {
        attention_of<V, false, false>(a, head, row0, rows, out, ld_out, scratch, map);
    }
}

template <class V>
inline qvit::cpu::OpTable table(const char* name) {
    return {name,         layer_norm<V>,    norm_codes<V>,         pixel_codes<V>,     codes<V>,
            to_floats<V>, to_half<V>,       to_gelu_codes<V>, to_threshold_codes<V>, find_thresholds<V>, to_head_codes<V>,
            accumulate<V>, attention<V>};
}

}  // namespace
