// What follows an integer product: sums to floats, to codes behind a GELU, or into float accumulators.
#pragma once

#include "math.h"
#include "quantize.h"

namespace {

using qvit::cpu::Activation;
using qvit::cpu::Sums;
using qvit::cpu::Tile;

// Pre-activations of one row of a tile. The multiplication and the addition stay apart, as in the reference engine.
template <class V, Sums::Form kForm>
struct Row {
    const Sums& s;
    const int32_t* sums;
    int m0;
    typename V::I row_term;
    typename V::F row_scale;

    Row(const Sums& s, const Tile& t, int r) : s(s), sums(t.sums + r * t.ld), m0(t.col0) {
        if constexpr (kForm == Sums::general) {
            row_term = V::iset(s.row ? s.row[t.row0 + r] : 0);
            row_scale = V::set(s.row_scale ? s.row_scale[t.row0 + r] : 1.0f);
        }
    }

    typename V::I whole(int j) const {
        auto sum = V::iload(sums + j);
        if constexpr (kForm == Sums::general) {
            if (s.doubled) {
                sum = V::iadd(sum, sum);
            }
            if (s.col) {
                sum = V::iadd(sum, V::iload(s.col + m0 + j));
            }
            sum = V::iadd(sum, row_term);
        }
        return sum;
    }

    typename V::F scaled(int j) const {
        if constexpr (kForm == Sums::general) {
            return V::mul(V::to_float(whole(j)), V::mul(V::load(s.scale + m0 + j), row_scale));
        }
        return V::mul(V::to_float(whole(j)), V::load(s.scale + m0 + j));
    }

    typename V::F operator()(int j) const {
        const auto bias = V::load(s.bias + m0 + j);
        if constexpr (kForm == Sums::floats) {
            return V::add(V::load(reinterpret_cast<const float*>(sums) + j), bias);
        } else {
            return V::add(scaled(j), bias);
        }
    }
};

// Calls f(form), the form being known to the compiler.
template <Sums::Form kForm>
struct FormIs {
    static constexpr Sums::Form value = kForm;
};

template <class Function>
inline void by_form(const Sums& s, const Function& f) {
    if (s.form == Sums::plain) {
        f(FormIs<Sums::plain>());
    } else if (s.form == Sums::general) {
        f(FormIs<Sums::general>());
    } else {
        f(FormIs<Sums::floats>());
    }
}

template <class V, Sums::Form kForm, bool kHalf>
void floats_of(const Tile& t, const Sums& s, const float* factor, const float* base, ptrdiff_t ld_base, float* out,
               ptrdiff_t ld_out) {
    for (int r = 0; r < t.rows; r++) {
        const Row<V, kForm> y(s, t, r);
        float* to = out + (t.row0 + r) * ld_out + t.col0;
        const float* from = base ? base + (t.row0 + r) * ld_base + t.col0 : nullptr;
        for (int j = 0; j < t.cols; j += V::W) {
            auto v = y(j);
            if (factor) {
                v = V::mul(v, V::load(factor + t.col0 + j));
            }
            if (from) {
                v = V::add(V::load(from + j), v);
            }
            if constexpr (kHalf) {
                v = V::to_half(v);
            }
            V::store(to + j, V::first(v, t.cols - j < V::W ? t.cols - j : V::W));
        }
    }
}

template <class V>
void to_floats(const Tile& t, const Sums& s, const float* factor, const float* base, ptrdiff_t ld_base, bool half, float* out,
               ptrdiff_t ld_out) {
    by_form(s, [&](auto form) {
        if (half) {
            floats_of<V, decltype(form)::value, true>(t, s, factor, base, ld_base, out, ld_out);
        } else {
            floats_of<V, decltype(form)::value, false>(t, s, factor, base, ld_base, out, ld_out);
        }
    });
}

template <class V>
void to_half(float* x, ptrdiff_t ldx, int rows, int channels) {
    for (int r = 0; r < rows; r++, x += ldx) {
        for (int c = 0; c < channels; c += V::W) {
            V::store(x + c, V::to_half(V::load(x + c)));
        }
    }
}

template <class V, Sums::Form kForm, Activation kActivation>
void gelu_codes_of(const Tile& t, const Sums& s, const Quantize& q, float margin, uint8_t* out, ptrdiff_t ld_out) {
    const auto low = V::set(q.low), high = V::set(q.high);
    const auto stored = V::iset(static_cast<int32_t>(q.low));
    for (int r = 0; r < t.rows; r++) {
        const Row<V, kForm> y(s, t, r);
        uint8_t* to = out + (t.row0 + r) * ld_out + t.col0;
        const auto row_inverse = V::set(q.row_inverse ? q.row_inverse[t.row0 + r] : 1.0f);
        const auto value = [&](int j) {
            const auto g = V::sub(activate<V, kActivation>(y(j)), V::load(q.offset + t.col0 + j));
            return V::mul(g, V::mul(V::load(q.inverse + t.col0 + j), row_inverse));
        };
        auto far = V::set(0.0f);
        for (int j = 0; j < t.cols; j += V::W) {
            const auto v = clamped<V>(value(j), low, high, far);
            store_some<V>(to + j, V::isub(V::to_int(v), stored), t.cols - j);
        }
        if (close_call<V>(far, margin)) {
            float values[V::W], inputs[V::W];
            for (int j = 0; j < t.cols; j += V::W) {
                V::store(values, value(j));
                V::store(inputs, y(j));
                for (int i = 0; i < V::W && j + i < t.cols; i++) {
                    if (is_close(values[i], margin)) {
                        to[j + i] = exact_gelu_code(inputs[i], kActivation, q, t.col0 + j + i,
                                                       q.row_inverse ? q.row_scale[t.row0 + r] : 1.0f);
                    }
                }
            }
        }
    }
}

template <int kValue>
struct Number {
    static constexpr int value = kValue;
};

// Calls f(activation), the activation being known to the compiler.
template <Activation kActivation>
struct ActivationIs {
    static constexpr Activation value = kActivation;
};

template <class Function>
inline auto by_activation(Activation activation, const Function& f) {
    if (activation == Activation::gelu) {
        return f(ActivationIs<Activation::gelu>());
    }
    if (activation == Activation::gelu_tanh) {
        return f(ActivationIs<Activation::gelu_tanh>());
    }
    return f(ActivationIs<Activation::quick_gelu>());
}

template <class V>
void to_gelu_codes(const Tile& t, const Sums& s, Activation activation, const Quantize& q, float margin, uint8_t* out,
                   ptrdiff_t ld_out) {
    by_form(s, [&](auto form) {
        by_activation(activation, [&](auto kind) {
            gelu_codes_of<V, decltype(form)::value, decltype(kind)::value>(t, s, q, margin, out, ld_out);
        });
    });
}

template <class V>
void accumulate(const Tile& t, const Sums& s, float* out, ptrdiff_t ld_out) {
    for (int r = 0; r < t.rows; r++) {
        const Row<V, Sums::general> y(s, t, r);
        float* to = out + r * ld_out;
        for (int j = 0; j < t.cols; j += V::W) {
            V::store(to + j, V::add(V::load(to + j), y.scaled(j)));
        }
    }
}

}  // namespace
