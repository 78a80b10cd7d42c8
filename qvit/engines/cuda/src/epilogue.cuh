// What follows a product: everything up to the next codes (or floats).
//
// A warp has sums[kRows][kColumns][4], fragments of its part [16 kRows, 8 kColumns] of the product; kWM and kWN are that part's
// size, and HEAD_DIM divides kWN.
#pragma once

#include "layout.cuh"
#include "rounding.cuh"
#include "stream.cuh"

struct GemmArgs {
    const uint8_t* a;         // codes [M, K] as `layout.cuh` says, padded with anything
    const int8_t* b;          // codes [N, K], padded with zeros
    const float* scale;       // [N padded]: scale_x * scale_w
    const float* bias;        // [N padded]: folded bias
    void* out;                // codes [M, N], floats (`Stream`) [.., ldo], or q [B, H, N, D]
    void* out_k;              // the same of k and v; codes, where floats and codes go out
    void* out_v;
    const Stream* residual;   // floats, RESIDUAL: added; may be `out`
    const float* gamma;       // floats, GAMMA: LayerScale [N]
    const float* position;    // floats, POSITION: added after all, [rows_out, N]
    const float* inverse;     // codes: 1 / step of the next input, or gain behind a standardisation [N]
    const float* offset;      // codes: offset of the next input [N]
    const float* step;        // codes: step of the next input [N]
    const float* shift;       // standardised: [N]
    const float* weight;      // standardised: affine part, [N]
    const float* affine;
    const int4* steps;        // heads, PERMUTED: [N padded]
    const uint8_t* table;     // activation: see `packed` in `qvit/engines/cuda/step_tables.py` and `comparisons.py`
    const int* index;         // floats, SCATTER: [M], where rows go: of floats and codes, or of codes alone where it is 2
    int m, n, k, ldo;                  // ldo: floats between rows, or tiles that a row of codes has
    int rows_in, rows_out, row_first;  // POSITION: row r goes to r / rows_in * rows_out + row_first + r % rows_in
    int heads, tokens;                 // heads: row r is token r % tokens of image r / tokens
    int chunks;                        // floats and codes: tiles that a row of codes has
    float low, high, margin;           // of the next codes
    float low_k, high_k, margin_k, low_v, high_v;
    float slope, slope_k;              // heads, PERMUTED: what is added to the margins
    uint32_t tokens_inverse;           // heads, PERMUTED: 2^32 / tokens
    double eps;                        // standardised
};

// Codes go out through shared memory, so many columns at a time; the padding of a row spreads banks.
constexpr int kOut = EPILOGUE == 3 ? 64 : kWN;
constexpr int kLine = kOut + 16;

// y, in the reference engine's roundings. Half-step weights count twice: their codes are 2 c + 1 and the sums are halved.
__device__ __forceinline__ float affine(int sum, float scale, float bias) {
    const float whole = __int2float_rn(sum);
    return __fadd_rn(__fmul_rn(W_HALF ? 0.5f * whole : whole, scale), bias);
}

// min(max(sum + shift, 0), most), one instruction on Hopper.
__device__ __forceinline__ int clamp_sum(int sum, int shift, int most) {
    return __viaddmin_s32_relu(sum, shift, most);
}

// What no kernel writes.
template <class T>
__device__ __forceinline__ T load_constant(const T* from) {
    return __ldg(from);
}

// The same of a column, which may have been copied to shared memory.
template <bool kStaged, class T>
__device__ __forceinline__ T read_column(const T* from) {
    if constexpr (kStaged) {
        return *from;
    } else {
        return load_constant(from);
    }
}

// Two neighbouring constants.
__device__ __forceinline__ void load_pair(const float* from, float (&to)[2]) {
    const float2 pair = *reinterpret_cast<const float2*>(from);
    to[0] = pair.x, to[1] = pair.y;
}

#if EPILOGUE == 0
#include "epilogue_floats.cuh"
#elif EPILOGUE == 1
#include "epilogue_activation.cuh"
#elif EPILOGUE == 2
#include "epilogue_heads.cuh"
#else
#include "epilogue_norm.cuh"
#endif
