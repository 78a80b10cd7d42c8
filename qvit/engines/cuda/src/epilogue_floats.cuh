// Floats go out (EPILOGUE 0).
#pragma once

#include "residual.cuh"

#if DIRECT

#include "whole_rows.cuh"

constexpr int kConstants = kOfOutput;

__device__ __forceinline__ void load_constants(const GemmArgs& p, float* to) { load_output_constants(p, to); }

__device__ __forceinline__ void finish(const GemmArgs& p, Part& part, int lane, unsigned char*, const float* of_columns,
                                       int (&sums)[kRows][kColumns][4]) {
    add_up_tile(p, part, lane, of_columns + 4 * (lane % 4), sums, [](int, const float(&)[4]) {});
}

#elif STAGED

#include "staged_rows.cuh"

__device__ __forceinline__ void finish_piece(const GemmArgs& p, const Place& of, const Place& next, int piece, int lane,
                                             unsigned char* slots, const int (&sums)[kRows][kColumns][4]) {
    add_up_piece(p, of, next, piece, lane, slots, [&](int j, float(&y)[4]) {
        const int c = of.column + 8 * j + 2 * (lane % 4);
        float scale[2], bias[2];
        load_pair(p.scale + c, scale);
        load_pair(p.bias + c, bias);
#pragma unroll
        for (int e = 0; e < 4; e++) {
            y[e] = affine(sums[0][j][e], scale[e % 2], bias[e % 2]);
        }
    });
}

__device__ __forceinline__ void finish(const GemmArgs& p, const Place& of, const Place& next, int lane, unsigned char* slots,
                                       const int (&sums)[kRows][kColumns][4]) {
#pragma unroll
    for (int piece = 0; piece < kPieces; piece++) {
        finish_piece(p, of, next, piece, lane, slots, sums);
    }
}

#else

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char*,
                                       int (&sums)[kRows][kColumns][4]) {
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
        const int c = column0 + 8 * j + 2 * (lane % 4);
        float scale[2], bias[2];
        load_pair(p.scale + c, scale);
        load_pair(p.bias + c, bias);
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row0 + 16 * i + 8 * half + lane / 4;
                if (r < p.m && c < p.n) {
                    float y[2] = {affine(sums[i][j][2 * half], scale[0], bias[0]),
                                  affine(sums[i][j][2 * half + 1], scale[1], bias[1])};
                    add_up(p, r, c, y);
                }
            }
        }
    }
}

#endif
