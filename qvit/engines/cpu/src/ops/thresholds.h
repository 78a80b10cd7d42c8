// GELU, scale, bias and rounding of a few bits as comparisons of the whole-number sum (`Thresholds`).
#pragma once

#include "epilogue.h"

namespace {

using qvit::cpu::kMostBelow;
using qvit::cpu::kPad;
using qvit::cpu::Thresholds;

// How many of kCount ascending thresholds t exceeds, by halving: the vectors of thresholds stay in registers over the rows.
template <class V, int kCount>
inline typename V::I passed(typename V::I t, const typename V::I* th) {
    const auto m4 = V::greater(t, th[kCount / 2]);
    if constexpr (kCount == 3) {
        const auto m2 = V::greater(t, V::pick(m4, th[2], th[0]));
        return V::add_where(m2, V::pick(m4, V::iset(2), V::iset(0)), V::iset(1));
    } else if constexpr (kCount == 7) {
        const auto m2 = V::greater(t, V::pick(m4, th[5], th[1]));
        const auto m1 = V::greater(t, V::pick(m4, V::pick(m2, th[6], th[4]), V::pick(m2, th[2], th[0])));
        return V::add_where(m1, V::add_where(m2, V::pick(m4, V::iset(4), V::iset(0)), V::iset(2)), V::iset(1));
    } else {
        const auto m3 = V::greater(t, V::pick(m4, th[11], th[3]));
        const auto m2 = V::greater(t, V::pick(m4, V::pick(m3, th[13], th[9]), V::pick(m3, th[5], th[1])));
        const auto low = V::pick(m3, V::pick(m2, th[6], th[4]), V::pick(m2, th[2], th[0]));
        const auto high = V::pick(m3, V::pick(m2, th[14], th[12]), V::pick(m2, th[10], th[8]));
        const auto m1 = V::greater(t, V::pick(m4, high, low));
        const auto code = V::add_where(m3, V::pick(m4, V::iset(8), V::iset(0)), V::iset(4));
        return V::add_where(m1, V::add_where(m2, code, V::iset(2)), V::iset(1));
    }
}

template <class V, Sums::Form kForm, int kCount, int kBelow>
void threshold_codes_of(const Tile& t, const Sums& s, const Thresholds& of, uint8_t* out, ptrdiff_t ld_out) {
    for (int j = 0; j < t.cols; j += V::W) {
        const int c = t.col0 + j;
        const int32_t* from = of.values + static_cast<ptrdiff_t>(c / kPad) * (kCount + kMostBelow) * kPad + c % kPad;
        typename V::I th[kCount + kMostBelow];
#pragma GCC unroll 18
        for (int i = 0; i < kCount + kBelow; i++) {
            th[i] = V::iload(from + i * kPad);
        }
        uint8_t* to = out + t.row0 * ld_out + c;
        for (int r = 0; r < t.rows; r++, to += ld_out) {
            const auto x = Row<V, kForm>(s, t, r).whole(j);
            auto code = passed<V, kCount>(x, th);
            if constexpr (kBelow > 0) {
                code = V::add_where(V::greater(th[kCount], x), code, V::iset(1));
            }
            if constexpr (kBelow > 1) {
                code = V::add_where(V::greater(th[kCount + 1], x), code, V::iset(1));
            }
            if constexpr (kBelow > 2) {
                code = V::add_where(V::greater(th[kCount + 2], x), code, V::iset(1));
            }
            store_some<V>(to, code, t.cols - j);
        }
    }
}

template <class V>
void to_threshold_codes(const Tile& t, const Sums& s, const Thresholds& of, uint8_t* out, ptrdiff_t ld_out) {
    by_form(s, [&](auto form) {
        constexpr Sums::Form kForm = decltype(form)::value;
        const auto call = [&](auto count) {
            constexpr int kCount = decltype(count)::value;
            if (of.below == 0) {
                threshold_codes_of<V, kForm, kCount, 0>(t, s, of, out, ld_out);
            } else if (of.below == 1) {
                threshold_codes_of<V, kForm, kCount, 1>(t, s, of, out, ld_out);
            } else if (of.below == 2) {
                threshold_codes_of<V, kForm, kCount, 2>(t, s, of, out, ld_out);
            } else {
                threshold_codes_of<V, kForm, kCount, 3>(t, s, of, out, ld_out);
            }
        };
        if (of.count == 3) {
            call(Number<3>());
        } else if (of.count == 7) {
            call(Number<7>());
        } else {
            call(Number<15>());
        }
    });
}

// --- finding them -------------------------------------------------------------------------------------------------------

// The function of one vector of channels that is being searched: t -> value whose rounding is the code.
template <class V, Activation kActivation>
struct CodeValue {
    const Sums& s;
    const Quantize& q;
    int c;

    typename V::F input(typename V::I t) const {
        return V::add(V::mul(V::to_float(t), V::load(s.scale + c)), V::load(s.bias + c));
    }
    typename V::F operator()(typename V::I t) const {
        const auto g = V::sub(activate<V, kActivation>(input(t)), V::load(q.offset + c));
        return V::mul(g, V::load(q.inverse + c));
    }
    float input(int32_t t, int lane) const { return static_cast<float>(t) * s.scale[c + lane] + s.bias[c + lane]; }
    double activation(int32_t t, int lane) const { return exact_gelu(static_cast<double>(input(t, lane)), kActivation); }
    int exact(int32_t t, int lane) const { return exact_gelu_code(input(t, lane), kActivation, q, c + lane, 1.0f); }
};

template <class V, Activation kActivation>
int find_thresholds_of(const Sums& s, const Quantize& q, float margin, int channels, int32_t reach, int count,
                       int32_t* thresholds) {
    // Where the activation is least.
    const float least_at = kActivation == Activation::gelu        ? -0.75179157f
                           : kActivation == Activation::gelu_tanh ? -0.75246173f
                                                                  : -0.75129502f;
    const int stride = count + kMostBelow;
    int most_below = 0;
    int32_t lanes[V::W], start[V::W];
    float close[V::W], close_before[V::W];
    for (int c = 0; c < channels; c += V::W) {
        const CodeValue<V, kActivation> value{s, q, c};
        int32_t* to = thresholds + static_cast<ptrdiff_t>(c / kPad) * stride * kPad + c % kPad;
        const int some = channels - c < V::W ? channels - c : V::W;
        for (int i = 0; i < V::W; i++) {
            if (i < some && !(s.scale[c + i] > 0.0f)) {
                return -1;
            }
            float at = i < some ? (least_at - s.bias[c + i]) / s.scale[c + i] : 0.0f;
            const float most = static_cast<float>(reach);
            at = !(at > -most) ? -most : at > most ? most : at;
            lanes[i] = static_cast<int32_t>(nearbyintf(at));
        }
        int base[V::W];
        for (int i = 0; i < some; i++) {
            // The whole number nearest to the least point need not be the one of least value: GELU is steeper to its right.
            int32_t best = lanes[i];
            for (int32_t t = lanes[i] - 1; t <= lanes[i] + 1; t++) {
                best = t >= -reach && t <= reach && value.activation(t, i) < value.activation(best, i) ? t : best;
            }
            lanes[i] = best;
            base[i] = value.exact(best, i);
        }
        const auto least = V::iload(lanes);
        V::istore(start, least);
        const int32_t bottom = -reach - 1, top = reach + 1;
        for (int k = 0; k < count + kMostBelow; k++) {
            // To the right: the largest t whose code is below k + 1. To the left: the smallest whose code is below
            // base + 1 + (k - count).
            const bool right = k < count;
            float level[V::W];
            for (int i = 0; i < V::W; i++) {
                const int code = right ? k + 1 : base[i < some ? i : 0] + 1 + k - count;
                level[i] = static_cast<float>(code) - 0.5f + q.low;
            }
            const auto want = V::load(level);
            // Between `in`, whose code is below the level, and `over`, where it reaches it (or behind the end of the reach).
            auto in = least, over = V::iset(right ? top : bottom);
            for (int step = 0; step < 32; step++) {
                const auto mid = V::half(V::iadd(in, over));
                const auto reaches = V::reaches(value(mid), want);
                in = V::pick(reaches, in, mid);
                over = V::pick(reaches, mid, over);
            }
            V::istore(lanes, in);
            V::store(close, V::abs(V::sub(value(in), want)));
            V::store(close_before, V::abs(V::sub(value(over), want)));
            for (int i = 0; i < some; i++) {
                const int code = right ? k + 1 : base[i] + 1 + k - count;  // the code whose beginning is looked for
                int32_t t = lanes[i];
                if (right ? code <= base[i] : code > count) {  // passed by all, fallen short of by none
                    to[k * kPad + i] = INT32_MIN;
                    continue;
                }
                if (close[i] < margin || close_before[i] < margin) {
                    // Once more, in float64: between `t`, whose code is below, and `end`, where it is reached, if anywhere.
                    int32_t end = right ? top : bottom;
                    t = start[i];
                    while (t + 1 < end || t - 1 > end) {
                        const int32_t mid = t + (end - t) / 2;
                        (value.exact(mid, i) >= code ? end : t) = mid;
                    }
                }
                // Right: codes from t + 1 on. Left: codes up to t - 1, that is, below t.
                const bool never = right ? t >= reach : t <= -reach;
                to[k * kPad + i] = right ? (never ? INT32_MAX : t) : (never ? INT32_MIN : t);
                if (!right && !never) {
                    most_below = k - count + 1 > most_below ? k - count + 1 : most_below;
                }
            }
        }
        // One more rise to the left would need another threshold.
        for (int i = 0; i < some; i++) {
            if (value.exact(-reach, i) > base[i] + kMostBelow) {
                return -1;
            }
        }
    }
    return most_below;
}

template <class V>
int find_thresholds(const Sums& s, Activation activation, const Quantize& q, float margin, int channels, int32_t reach, int count,
                    int32_t* thresholds) {
    return by_activation(activation, [&](auto kind) {
        return find_thresholds_of<V, decltype(kind)::value>(s, q, margin, channels, reach, count, thresholds);
    });
}

}  // namespace
