// Floats behind a product of few rows, four neighbours a thread; constants and what is added are on their way to shared memory
// beforehand.
#pragma once

#include "few_sums.cuh"
#include "residual.cuh"

// Scale, bias and LayerScale of the tile's columns; then what a thread adds, where it alone reads it.
constexpr int kColumnArrays = 2 + GAMMA, kAdded = RESIDUAL + POSITION;
constexpr int kBesideBytes = 4 * kColumnArrays * kBN + 16 * kAdded * kTurns * kThreads;

struct Finish {
    const GemmArgs& p;
    float* beside;
    int row0, column0;
    const Stream* residual[kTurns];  // RESIDUAL: what the thread adds, or null

    // What no kernel writes is on its way.
    __device__ __forceinline__ Finish(const GemmArgs& p, unsigned char* beside, int row0, int column0)
        : p(p), beside(reinterpret_cast<float*>(beside)), row0(row0), column0(column0) {
        const Task task;
        const int column = column0 + task.column;
        if (task.first == 0) {
            copy_async(of_columns(task, 0), p.scale + column, true);
            copy_async(of_columns(task, 1), p.bias + column, true);
            if constexpr (GAMMA) {
                copy_async(of_columns(task, 2), p.gamma + (column < p.n ? column : 0), true);
            }
        }
        if constexpr (POSITION) {
#pragma unroll
            for (int i = 0; i < kTurns; i++) {
                if (const int to = place(task, i); to >= 0) {
                    copy_async(added(task, RESIDUAL, i), p.position + static_cast<size_t>(to % p.rows_out) * p.n + column, true);
                }
            }
        }
        copies_end_group();
        if constexpr (RESIDUAL) {
#pragma unroll
            for (int i = 0; i < kTurns; i++) {
                const int to = place(task, i);
                residual[i] = to >= 0 ? p.residual + at(task, to) : nullptr;
                hold(residual[i]);
            }
        }
    }

    // The same of what the kernels before have written.
    __device__ __forceinline__ void fetch() const {
        if constexpr (RESIDUAL) {
            const Task task;
#pragma unroll
            for (int i = 0; i < kTurns; i++) {
                if (residual[i] != nullptr) {
                    if constexpr (OUT_HALF) {
                        copy_eight_async(added(task, 0, i), residual[i]);
                    } else {
                        copy_async(added(task, 0, i), residual[i], true);
                    }
                }
            }
            copies_end_group();
        }
    }

    __device__ __forceinline__ void run(const Sums& sums) const {
        const Task task;
        const float4 scales = four(of_columns(task, 0)), biases = four(of_columns(task, 1));
        const float4 gammas = GAMMA ? four(of_columns(task, 2)) : scales;
        const float scale[4] = {scales.x, scales.y, scales.z, scales.w}, bias[4] = {biases.x, biases.y, biases.z, biases.w};
        const float gamma[4] = {gammas.x, gammas.y, gammas.z, gammas.w};
#pragma unroll
        for (int i = 0; i < kTurns; i++) {
            if (const int to = place(task, i); to >= 0) {
                int s[4];
                sums.read(task.row(i), task.column, s);
                float residual[4] = {}, position[4] = {};
                if constexpr (RESIDUAL) {
                    load_values(reinterpret_cast<const Stream*>(added(task, 0, i)), residual);
                }
                if constexpr (POSITION) {
                    load_values(added(task, RESIDUAL, i), position);
                }
                float y[4];
#pragma unroll
                for (int e = 0; e < 4; e++) {  // in the reference engine's order
                    y[e] = affine(s[e], scale[e], bias[e]);
                    if constexpr (GAMMA) {
                        y[e] = __fmul_rn(y[e], gamma[e]);
                    }
                    if constexpr (RESIDUAL) {
                        y[e] = __fadd_rn(residual[e], y[e]);
                    }
                    if constexpr (POSITION) {
                        y[e] = __fadd_rn(y[e], position[e]);
                    }
                    if constexpr (HALVED) {
                        y[e] *= 0.5f;
                    }
                }
                store_values(static_cast<Stream*>(p.out) + at(task, to), y);
            }
        }
    }

    // Where a row goes; -1: nowhere.
    __device__ __forceinline__ int place(const Task& task, int i) const {
        const int row = task.row(i), r = row0 + row;
        if (row >= kBM || r >= p.m || column0 + task.column >= p.n) {
            return -1;
        }
        return POSITION ? r / p.rows_in * p.rows_out + p.row_first + r % p.rows_in : float_row(p, r);
    }
    __device__ __forceinline__ size_t at(const Task& task, int to) const {
        return static_cast<size_t>(to) * p.ldo + (column0 + task.column);
    }
    __device__ __forceinline__ float* of_columns(const Task& task, int array) const { return beside + array * kBN + task.column; }
    __device__ __forceinline__ float* added(const Task& task, int array, int i) const {
        return beside + kColumnArrays * kBN + 4 * ((array * kTurns + i) * kThreads + task.thread);
    }
    __device__ __forceinline__ static float4 four(const float* from) { return *reinterpret_cast<const float4*>(from); }
};
