// exp2 and GELU on vectors, with their error bounds.
#pragma once

namespace {

// 2^x for x <= 0 (any x above -2^22; below -126 the result underflows to 0 or a denormal).
// Polynomial of degree 5 on [-1/2, 1/2], fitted by Lawson's weighted least squares: relative error below 2e-7 with rounding.
template <class V>
inline typename V::F exp2_of(typename V::F x) {
    const auto f = V::off_grid(x);
    auto p = V::set(1.3276472454890609e-3f);
    p = V::fma(p, f, V::set(9.675541892647743e-3f));
    p = V::fma(p, f, V::set(5.550713092088699e-2f));
    p = V::fma(p, f, V::set(2.4022120237350464e-1f));
    p = V::fma(p, f, V::set(6.931469440460205e-1f));
    p = V::fma(p, f, V::set(1.0f));
    return V::scale2(p, V::sub(x, f));
}

// GELU(x) = max(x, 0) - u * Phi(-u), u = |x|; log2 Phi(-u) is a polynomial of degree 6 in u, fitted for the least absolute
// error of u * Phi(-u) on [0, 6], beyond which that is below 6e-9. Absolute error below 1e-7 with rounding.
template <class V>
inline typename V::F gelu(typename V::F x) {
    const auto u = V::min(V::abs(x), V::set(6.0f));
    auto p = V::set(3.3092812e-5f);
    p = V::fma(p, u, V::set(-7.6921971e-4f));
    p = V::fma(p, u, V::set(8.0807162e-3f));
    p = V::fma(p, u, V::set(-5.3412102e-2f));
    p = V::fma(p, u, V::set(-4.5877096e-1f));
    p = V::fma(p, u, V::set(-1.1512017f));
    p = V::fma(p, u, V::set(-9.9999309e-1f));
    return V::fnma(u, exp2_of<V>(p), V::max(x, V::set(0.0f)));
}

// x * sigmoid(z), as max(x, 0) - |x| * sigmoid(-|z|) for z of x's sign.
template <class V>
inline typename V::F gated(typename V::F x, typename V::F z) {
    const auto e = exp2_of<V>(V::mul(V::min(V::abs(z), V::set(80.0f)), V::set(-1.44269504f)));
    const auto tail = V::div(V::mul(V::abs(x), e), V::add(V::set(1.0f), e));
    return V::sub(V::max(x, V::set(0.0f)), tail);
}

template <class V, qvit::cpu::Activation kActivation>
inline typename V::F activate(typename V::F x) {
    using qvit::cpu::Activation;
    if constexpr (kActivation == Activation::gelu) {
        return gelu<V>(x);
    } else if constexpr (kActivation == Activation::quick_gelu) {
        return gated<V>(x, V::mul(x, V::set(1.702f)));
    } else {
        // 0.5 * (1 + tanh(t)) = sigmoid(2 t)
        const auto inner = V::fma(V::mul(V::mul(x, x), x), V::set(0.044715f), x);
        return gated<V>(x, V::mul(inner, V::set(1.5957691216f)));
    }
}

}  // namespace
