// Codes of q, k and v behind a product of few rows, four neighbours a thread: as `epilogue_heads.cuh` where PERMUTED, with columns
// in their own order. HEAD_DIM / 4 lanes have a head's row.
#pragma once

#include "epilogue_heads.cuh"
#include "few_sums.cuh"

constexpr int kHeadLanes = HEAD_DIM / 4;
constexpr int kBesideBytes = 16 * kBN + 16 * kFours;  // numbers of columns, and places of touches

struct HeadRange {
    float low, high, margin, slope;
};

// Standardised (row by row) and rounded as defined; a thread's four codes, the lowest as 0. `near`: the mean or nearly so.
__device__ __noinline__ inline uint32_t exact_head(const GemmArgs& p, int column, HeadRange of, float near, float y0, float y1,
                                                   float y2, float y3) {
    const float y[4] = {y0, y1, y2, y3};
    const float4 weight = *reinterpret_cast<const float4*>(p.weight + column),
                 affine = *reinterpret_cast<const float4*>(p.affine + column),
                 offset = *reinterpret_cast<const float4*>(p.offset + column),
                 step = *reinterpret_cast<const float4*>(p.step + column);
    // Differences from what is nearly the mean, as in `few_norm.cuh`.
    double sum = 0.0, squares = 0.0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const double d = static_cast<double>(y[e]) - static_cast<double>(near);
        sum += d;
        squares = fma(d, d, squares);
    }
    add_both<kHeadLanes>(sum, squares);
    const double beside = sum * (1.0 / HEAD_DIM), mean = static_cast<double>(near) + beside;
    const double rstd = rsqrt(squares * (1.0 / HEAD_DIM) - beside * beside + p.eps);
    const float w[4] = {weight.x, weight.y, weight.z, weight.w}, a[4] = {affine.x, affine.y, affine.z, affine.w};
    const float o[4] = {offset.x, offset.y, offset.z, offset.w}, s[4] = {step.x, step.y, step.z, step.w};
    uint32_t codes = 0;
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float z = __double2float_rn((static_cast<double>(y[e]) - mean) * rstd);
        const float x = __fadd_rn(__fmul_rn(z, w[e]), a[e]);
        codes |= static_cast<uint32_t>(exact_code(x, o[e], s[e], of.low, of.high) - static_cast<int>(of.low)) << (8 * e);
    }
    return codes;
}

struct Finish {
    const GemmArgs& p;
    unsigned char* columns;  // `p.steps` of the tile, every fourth of them, so that neighbours read neighbours
    int row0, column0;

    // What no kernel writes is on its way.
    __device__ __forceinline__ Finish(const GemmArgs& p, unsigned char* columns, int row0, int column0)
        : p(p), columns(columns), row0(row0), column0(column0) {
        const Task task;
        const int column = column0 + task.column;
        if (task.first == 0) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                copy_async(numbers_at(task, e), p.steps + column + e, true);
            }
            if constexpr (RECTIFY) {  // `exact_head` will find these near
                unsigned char* const place = columns + 16 * kBN + 4 * task.thread;
                touch(place, p.weight + column);
                touch(place + 4 * kFours, p.affine + column);
                touch(place + 8 * kFours, p.offset + column);
                touch(place + 12 * kFours, p.step + column);
            }
        }
        copies_end_group();
    }

    __device__ __forceinline__ unsigned char* numbers_at(const Task& task, int e) const {
        return columns + 16 * (e * kFours) + 4 * task.column;
    }

    __device__ __forceinline__ void fetch() const {}

    __device__ __forceinline__ void run(const Sums& sums) const {
        const Task task;
        const int column = column0 + task.column, width = p.heads * HEAD_DIM;
        const int part = (column >= width) + (column >= 2 * width) + (column >= 3 * width), inside = column - part * width;
        const bool rectify = RECTIFY && part < 2, doubled = Q_DOUBLED && part == 0;
        const HeadRange of = {part == 0 ? p.low : p.low_k, part == 0 ? p.high : p.high_k, part == 0 ? p.margin : p.margin_k,
                              part == 0 ? p.slope : p.slope_k};
        const int low = code_of(of.low);
        unsigned char* const out = static_cast<unsigned char*>(part == 0 ? p.out : part == 1 ? p.out_k : p.out_v) +
                                   static_cast<size_t>(inside / HEAD_DIM * p.tokens) * HEAD_DIM + inside % HEAD_DIM;
        int4 numbers[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            numbers[e] = *reinterpret_cast<const int4*>(numbers_at(task, e));
        }
#pragma unroll
        for (int i = 0; i < kTurns; i++) {
            const int row = task.row(i), line = row < kBM && part < 3 ? line_of(p, row0 + row) : -1;
            int s[4];
            sums.read(min(row, kBM - 1), task.column, s);
            // Lanes of one warp may be of different parts, and add up together.
            uint32_t codes = RECTIFY && __any_sync(kAll, rectify) ? rectified(column, rectify, of, numbers, s) : 0;
            if (!rectify) {
                codes = linear(numbers, s);
            }
            if (rectify || doubled) {
                codes = shifted(codes, low, doubled);
            }
            if (line >= 0) {
                *reinterpret_cast<uint32_t*>(out + static_cast<size_t>(line) * HEAD_DIM) = codes;
            }
        }
    }

    __device__ __forceinline__ static uint32_t linear(const int4 (&numbers)[4], const int (&s)[4]) {
        uint32_t u[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const uint32_t w = static_cast<uint32_t>(clamp_sum(s[e], numbers[e].x, numbers[e].y));
            u[e] = w * static_cast<uint32_t>(numbers[e].z) + static_cast<uint32_t>(numbers[e].w);
        }
        return __byte_perm(__byte_perm(u[0], u[1], 0x0073), __byte_perm(u[2], u[3], 0x0073), 0x5410);
    }

    __device__ __forceinline__ uint32_t rectified(int column, bool rectify, const HeadRange& of, const int4 (&numbers)[4],
                                                  const int (&s)[4]) const {
        const int scale[4] = {numbers[0].x, numbers[0].z, numbers[2].x, numbers[2].z};
        const int bias[4] = {numbers[0].y, numbers[0].w, numbers[2].y, numbers[2].w};
        const int gain[4] = {numbers[1].x, numbers[1].z, numbers[3].x, numbers[3].z};
        const int offset[4] = {numbers[1].y, numbers[1].w, numbers[3].y, numbers[3].w};
        float y[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            y[e] = __fadd_rn(__fmul_rn(__int2float_rn(s[e]), __int_as_float(scale[e])), __int_as_float(bias[e]));
        }
        float sum = (y[0] + y[1]) + (y[2] + y[3]), square = fmaf(y[0], y[0], y[1] * y[1]) + fmaf(y[2], y[2], y[3] * y[3]);
        add_both<kHeadLanes>(sum, square);
        const float mean = sum * (1.0f / HEAD_DIM);
        square *= 1.0f / HEAD_DIM;
        const float rstd = rsqrtf(fmaxf(fmaf(-mean, mean, square), 0.0f) + static_cast<float>(p.eps)), moved = -mean * rstd;
        // Where the mean is large beside the deviation, its square takes digits from the variance.
        const float margin = fmaf(of.slope, square * rstd * rstd, of.margin);
        // In units of the last bit; a value is in doubt that lies within it of the boundary between two codes.
        const float units = ceilf(fminf(margin * (1 << kFraction), 16384.0f));
        const uint32_t reach = 2 * static_cast<uint32_t>(units);
        const float most = (of.high - of.low) * (1 << kFraction), whole = 8388608.0f + (1 << (kFraction - 1)) + units;
        uint32_t u[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float place = __saturatef(fmaf(fmaf(y[e], rstd, moved), __int_as_float(gain[e]), __int_as_float(offset[e])));
            u[e] = static_cast<uint32_t>(__float_as_int(fmaf(place, most, whole)));
        }
        const uint32_t least = __vminu2(__byte_perm(u[0], u[1], 0x5410), __byte_perm(u[2], u[3], 0x5410));
        const bool doubt = rectify && (min(least & 0xFFFFu, least >> 16) <= reach || reach >= 32768u);
        if (__any_sync(kAll, doubt)) {
            return exact_head(p, column, of, mean, y[0], y[1], y[2], y[3]);
        }
        return __byte_perm(__byte_perm(u[0], u[1], 0x0062), __byte_perm(u[2], u[3], 0x0062), 0x5410);
    }
};
