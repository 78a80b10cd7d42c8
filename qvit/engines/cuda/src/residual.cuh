// A row's floats behind a product: LayerScale, residual and position, added up and stored.
#pragma once

// Two neighbours of a row of floats; `both`: there are two. EVEN: there always are, and rows begin at even places.
template <class T>
__device__ __forceinline__ void load_row_pair(const T* from, bool both, float (&to)[2]) {
    if constexpr (EVEN) {
        load_values(from, to);
    } else {
        to[0] = value_of(from[0]), to[1] = both ? value_of(from[1]) : 0.0f;
    }
}

template <class T>
__device__ __forceinline__ void store_row_pair(T* to, bool both, const float (&from)[2]) {
    if constexpr (EVEN) {
        store_values(to, from);
    } else {
        store_value(to, from[0]);
        if (both) {
            store_value(to + 1, from[1]);
        }
    }
}

// Where a row's floats and its codes go.
__device__ __forceinline__ int float_row(const GemmArgs& p, int r) { return SCATTER == 1 ? p.index[r] : r; }
__device__ __forceinline__ int code_row(const GemmArgs& p, int r) { return SCATTER ? p.index[r] : r; }

// LayerScale, residual and position, in the reference engine's order, of columns c and c + 1 of row r; out and back.
__device__ __forceinline__ void add_up(const GemmArgs& p, int r, int c, float (&y)[2]) {
    const bool both = c + 1 < p.n;
    const int to = POSITION ? r / p.rows_in * p.rows_out + p.row_first + r % p.rows_in : float_row(p, r);
    const size_t at = static_cast<size_t>(to) * p.ldo + c;
    float other[2];
    if constexpr (GAMMA) {
        load_row_pair(p.gamma + c, both, other);
        y[0] = __fmul_rn(y[0], other[0]), y[1] = __fmul_rn(y[1], other[1]);
    }
    if constexpr (RESIDUAL) {
        load_row_pair(p.residual + at, both, other);
        y[0] = __fadd_rn(other[0], y[0]), y[1] = __fadd_rn(other[1], y[1]);
    }
    if constexpr (POSITION) {
        load_row_pair(p.position + static_cast<size_t>(to % p.rows_out) * p.n + c, both, other);
        y[0] = __fadd_rn(y[0], other[0]), y[1] = __fadd_rn(y[1], other[1]);
    }
    if constexpr (HALVED) {
        y[0] *= 0.5f, y[1] *= 0.5f;
    }
    store_row_pair(static_cast<Stream*>(p.out) + at, both, y);
}
