// What follows a product: everything up to the next codes (or floats).
//
// A warp has sums[kRows][kColumns][4], fragments of its part [16 kRows, 8 kColumns] of the product; kWM and kWN are that part's
// size, and HEAD_DIM divides kWN.
#pragma once

#include "layout.cuh"
#include "rounding.cuh"

struct GemmArgs {
    const uint8_t* a;         // codes [M, K] as `layout.cuh` says, padded with anything
    const int8_t* b;          // codes [N, K], padded with zeros
    const float* scale;       // [N padded]: scale_x * scale_w
    const float* bias;        // [N padded]: folded bias
    void* out;                // codes [M, N], floats [.., ldo], or q [B, H, N, D]
    void* out_k;              // the same of k and v; codes, where floats and codes go out
    void* out_v;
    const float* residual;    // floats, RESIDUAL: added; may be `out`
    const float* gamma;       // floats, GAMMA: LayerScale [N]
    const float* position;    // floats, POSITION: added after all, [rows_out, N]
    const float* inverse;     // codes: 1 / step of the next input, or gain behind a standardisation [N]
    const float* offset;      // codes: offset of the next input [N]
    const float* step;        // codes: step of the next input [N]
    const float* shift;       // standardised: [N]
    const float* weight;      // standardised: affine part, [N]
    const float* affine;
    const uint4* thresholds;  // activation, THRESHOLDS: [N padded], see `qvit/engines/cuda/thresholds.py`
    const int* index;         // floats, SCATTER: [M], where rows go: of floats and codes, or of codes alone where it is 2
    int m, n, k, ldo;                  // ldo: floats between rows, or tiles that a row of codes has
    int rows_in, rows_out, row_first;  // POSITION: row r goes to r / rows_in * rows_out + row_first + r % rows_in
    int heads, tokens;                 // heads: row r is token r % tokens of image r / tokens
    int chunks;                        // floats and codes: tiles that a row of codes has
    float low, high, margin;           // of the next codes
    float low_k, high_k, margin_k, low_v, high_v;
    double eps;                        // of the rectified heads
};

// Codes go out through shared memory, so many columns at a time; the padding of a row spreads banks.
constexpr int kOut = EPILOGUE == 3 && kWN > 128 ? (kWN % 128 == 0 ? 128 : 64) : kWN;
constexpr int kLine = kOut + 16;

// y, in the reference engine's roundings. Half-step weights count twice: their codes are 2 c + 1 and the sums are halved.
__device__ __forceinline__ float affine(int sum, float scale, float bias) {
    const float whole = __int2float_rn(sum);
    return __fadd_rn(__fmul_rn(W_HALF ? 0.5f * whole : whole, scale), bias);
}

// Two neighbouring constants.
__device__ __forceinline__ void load_pair(const float* from, float (&to)[2]) {
    const float2 pair = *reinterpret_cast<const float2*>(from);
    to[0] = pair.x, to[1] = pair.y;
}

#if EPILOGUE == 0 || EPILOGUE == 3  // floats

// Two neighbouring floats of a row; `both`: there are two. EVEN: there always are, and rows begin at even places.
__device__ __forceinline__ void load_row_pair(const float* from, bool both, float (&to)[2]) {
    if constexpr (EVEN) {
        load_pair(from, to);
    } else {
        to[0] = from[0], to[1] = both ? from[1] : 0.0f;
    }
}

__device__ __forceinline__ void store_row_pair(float* to, bool both, const float (&from)[2]) {
    if constexpr (EVEN) {
        *reinterpret_cast<float2*>(to) = {from[0], from[1]};
    } else {
        to[0] = from[0];
        if (both) {
            to[1] = from[1];
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
    store_row_pair(static_cast<float*>(p.out) + at, both, y);
}

#endif

#if EPILOGUE == 0

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

#else  // codes, with or without floats

// A warp's codes [kWM][kOut], which lie in `lines`, go out in pieces of 16 bytes.
template <class Where>
__device__ __forceinline__ void send(const unsigned char* lines, int lane, int row0, int rows, const Where& where) {
    __syncwarp();
    for (int i = lane; i < kWM * (kOut / 16); i += 32) {
        const int row = i / (kOut / 16), piece = i % (kOut / 16);
        if (row0 + row < rows) {
            if (unsigned char* to = where(row0 + row, 16 * piece)) {
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(lines + row * kLine + 16 * piece);
            }
        }
    }
}

#if OUT_BITS
// The same as planes of bits, 32 columns a lane at a time; `first`: column of the first, `row_of`: where a row goes.
template <class RowOf>
__device__ __forceinline__ void send_bits(const unsigned char* lines, int lane, int row0, int rows, void* to, int first, int columns,
                                          int chunks, const RowOf& row_of) {
    __syncwarp();
    for (int i = lane; i < kWM * (kOut / 32); i += 32) {
        const int row = i / (kOut / 32), c = i % (kOut / 32) * 32;
        if (row0 + row < rows && first + c < columns) {
            const uint32_t* codes = reinterpret_cast<const uint32_t*>(lines + row * kLine + c);
            uint32_t high = 0, low = 0;
#pragma unroll
            for (int w = 0; w < 8; w++) {
                high |= four_bits(codes[w], 1) << (4 * w);
                low |= four_bits(codes[w], 0) << (4 * w);
            }
            unsigned char* out = static_cast<unsigned char*>(to);
            const int line = row_of(row0 + row);
            *reinterpret_cast<uint32_t*>(out + code_at(line, bit_at(first + c, 1), chunks)) = high;
            *reinterpret_cast<uint32_t*>(out + code_at(line, bit_at(first + c, 0), chunks)) = low;
        }
    }
}
#endif

__device__ __forceinline__ void put(unsigned char* lines, int row, int column, int first, int second) {
    *reinterpret_cast<uint16_t*>(lines + row * kLine + column) = static_cast<uint16_t>((first & 0xFF) | (second & 0xFF) << 8);
}

#if EPILOGUE == 1  // activation, then codes

__device__ __forceinline__ int activation_code(const GemmArgs& p, int sum, int c, float scale, float bias, float inverse,
                                               float offset) {
    const float y = affine(sum, scale, bias);
    const float v = clamp((fast_activation<ACTIVATION>(y) - offset) * inverse, p.low, p.high);
    if (is_close(v, p.margin)) {
        const float g = __double2float_rn(exact_activation<ACTIVATION>(static_cast<double>(y)));
        return exact_code(g, offset, p.step[c], p.low, p.high);
    }
    return code_of(v);
}

#if THRESHOLDS
// A code less the lowest, by comparisons.
__device__ __forceinline__ int compared(int sum, const uint4& t) {
    return (sum >= static_cast<int>(t.x)) + (sum >= static_cast<int>(t.y)) + (sum >= static_cast<int>(t.z)) +
           (sum < static_cast<int>(t.w));
}
#endif

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char* lines,
                                       int (&sums)[kRows][kColumns][4]) {
#if THRESHOLDS
    const int lowest = static_cast<int>(p.low);
#endif
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
        const int c = column0 + 8 * j + 2 * (lane % 4);
#if THRESHOLDS
        const uint4 thresholds[2] = {p.thresholds[c], p.thresholds[c + 1]};
#else
        float scale[2], bias[2], inverse[2], offset[2];
        load_pair(p.scale + c, scale);
        load_pair(p.bias + c, bias);
        load_pair(p.inverse + c, inverse);
        load_pair(p.offset + c, offset);
#endif
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int codes[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int sum = sums[i][j][2 * half + e];
#if THRESHOLDS
                    codes[e] = compared(sum, thresholds[e]) + lowest;
#else
                    codes[e] = activation_code(p, sum, c + e, scale[e], bias[e], inverse[e], offset[e]);
#endif
                }
                put(lines, 16 * i + 8 * half + lane / 4, 8 * j + 2 * (lane % 4), codes[0], codes[1]);
            }
        }
    }
#if OUT_BITS
    send_bits(lines, lane, row0, p.m, p.out, column0, p.n, p.ldo, [](int row) { return row; });
#else
    send(lines, lane, row0, p.m, [&](int row, int column) -> unsigned char* {
        const int c = column0 + column;
        return c < p.n ? static_cast<unsigned char*>(p.out) + code_at(row, c, p.ldo) : nullptr;
    });
#endif
}

#elif EPILOGUE == 3  // LayerNorm of whole rows, codes: kWN is the width of a row

// The codes of columns first .. first + kOut of one of a quad's rows, as they are defined; `mine`: for this lane's columns. Reads
// the floats that these lanes have just written, so that nothing is held in registers for a case that is rare.
#ifndef QVIT_EMULATION
__noinline__
#endif
__device__ inline void codes_again(const GemmArgs& p, int r, int line, int first, int lane, bool mine, unsigned char* lines) {
    const float* x = static_cast<const float*>(p.out) + static_cast<size_t>(float_row(p, r)) * p.ldo + 2 * (lane % 4);
    double sum = 0.0, squares = 0.0;
#pragma unroll 1
    for (int c = 0; c < kWN; c += 8) {
        sum += static_cast<double>(x[c]) + static_cast<double>(x[c + 1]);
    }
    const double mean = quad_sum(sum) / kWN;
#pragma unroll 1
    for (int c = 0; c < kWN; c += 8) {
        const double a = static_cast<double>(x[c]) - mean, b = static_cast<double>(x[c + 1]) - mean;
        squares += a * a + b * b;
    }
    const double rstd = 1.0 / sqrt(quad_sum(squares) / kWN + p.eps);
    if (mine) {
#pragma unroll 1
        for (int i = 0; i < kOut / 4; i++) {
            const int from = first + i / 2 * 8 + i % 2, c = from + 2 * (lane % 4);
            const double z = (static_cast<double>(x[from]) - mean) * rstd;
            const float y = __double2float_rn(z * static_cast<double>(p.weight[c]) + static_cast<double>(p.affine[c]));
            lines[line * kLine + c - first] = static_cast<unsigned char>(exact_code(y, p.offset[c], p.step[c], p.low, p.high));
        }
    }
}

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int, int lane, unsigned char* lines,
                                       int (&sums)[kRows][kColumns][4]) {
    static_assert(kRows == 1, "a warp holds 16 rows");
    const int c0 = 2 * (lane % 4);
    float y[kColumns][4];
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
        float scale[2], bias[2];
        load_pair(p.scale + c0 + 8 * j, scale);
        load_pair(p.bias + c0 + 8 * j, bias);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float pair[2] = {affine(sums[0][j][2 * half], scale[0], bias[0]),
                             affine(sums[0][j][2 * half + 1], scale[1], bias[1])};
            const int r = row0 + 8 * half + lane / 4;
            if (r < p.m) {
                add_up(p, r, c0 + 8 * j, pair);
            }
            y[j][2 * half] = pair[0], y[j][2 * half + 1] = pair[1];
        }
    }
    float mean[2], rstd[2], near[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
            sum += y[j][2 * half] + y[j][2 * half + 1];
        }
        mean[half] = quad_sum(sum) * (1.0f / kWN);
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
            const float a = y[j][2 * half] - mean[half], b = y[j][2 * half + 1] - mean[half];
            squares = fmaf(a, a, fmaf(b, b, squares));
        }
        rstd[half] = rsqrtf(quad_sum(squares) * (1.0f / kWN) + static_cast<float>(p.eps));
        near[half] = p.margin * (1.0f + 0.25f * fabsf(mean[half]) * rstd[half]);
    }
#pragma unroll
    for (int first = 0; first < kWN; first += kOut) {
        __syncwarp();  // the codes before have gone out
        bool close[2] = {false, false};
#pragma unroll
        for (int j = 0; j < kOut / 8; j++) {
            const int c = first + 8 * j + c0;
            float gain[2], shift[2];
            load_pair(p.inverse + c, gain);
            load_pair(p.shift + c, shift);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int code[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float z = (y[first / 8 + j][2 * half + e] - mean[half]) * rstd[half];
                    const float v = clamp(fmaf(z, gain[e], shift[e]), p.low, p.high);
                    close[half] |= is_close(v, near[half]);
                    code[e] = code_of(v);
                }
                put(lines, 8 * half + lane / 4, 8 * j + c0, code[0], code[1]);
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int line = 8 * half + lane / 4, r = row0 + line;
            const bool mine = close[half] && r < p.m;
            if (__any_sync(kAll, mine)) {  // the whole warp, since a quad adds up together
                codes_again(p, r < p.m ? r : p.m - 1, line, first, lane, mine, lines);
            }
        }
#if OUT_BITS
        send_bits(lines, lane, row0, p.m, p.out_k, first, kWN, p.chunks, [&](int row) { return code_row(p, row); });
#else
        send(lines, lane, row0, p.m, [&](int row, int column) -> unsigned char* {
            return static_cast<unsigned char*>(p.out_k) + code_at(code_row(p, row), first + column, p.chunks);
        });
#endif
    }
}

#else  // q, k and v: IRM, then codes

constexpr int kHeadColumns = HEAD_DIM / 8;  // fragments

// The two rows of one head that a quad holds, from sums to codes.
__device__ __forceinline__ void rectified(const GemmArgs& p, float (&y)[kHeadColumns][4], int c0, float low, float high,
                                          float margin, int (&codes)[kHeadColumns][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum = 0.0f, squares = 0.0f;
#pragma unroll
        for (int j = 0; j < kHeadColumns; j++) {
            sum += y[j][2 * half] + y[j][2 * half + 1];
        }
        const float mean = quad_sum(sum) * (1.0f / HEAD_DIM);
#pragma unroll
        for (int j = 0; j < kHeadColumns; j++) {
            const float a = y[j][2 * half] - mean, b = y[j][2 * half + 1] - mean;
            squares = fmaf(a, a, fmaf(b, b, squares));
        }
        const float rstd = rsqrtf(quad_sum(squares) * (1.0f / HEAD_DIM) + static_cast<float>(p.eps));
        const float near = margin * (1.0f + 0.25f * fabsf(mean) * rstd);
        bool close = false;
#pragma unroll
        for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int c = c0 + 8 * j + e;
                const float v = clamp(fmaf((y[j][2 * half + e] - mean) * rstd, p.inverse[c], p.shift[c]), low, high);
                close |= is_close(v, near);
                codes[j][2 * half + e] = code_of(v);
            }
        }
        if (__any_sync(kAll, close)) {  // the whole warp, since a quad adds up together
            double wide = 0.0, wide_squares = 0.0;
#pragma unroll
            for (int j = 0; j < kHeadColumns; j++) {
                wide += static_cast<double>(y[j][2 * half]) + static_cast<double>(y[j][2 * half + 1]);
            }
            const double exact_mean = quad_sum(wide) / HEAD_DIM;
#pragma unroll
            for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const double d = static_cast<double>(y[j][2 * half + e]) - exact_mean;
                    wide_squares += d * d;
                }
            }
            const double exact_rstd = 1.0 / sqrt(quad_sum(wide_squares) / HEAD_DIM + p.eps);
            if (close) {
#pragma unroll
                for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int c = c0 + 8 * j + e;
                        const float z = __double2float_rn((static_cast<double>(y[j][2 * half + e]) - exact_mean) * exact_rstd);
                        const float x = __fadd_rn(__fmul_rn(z, p.weight[c]), p.affine[c]);
                        codes[j][2 * half + e] = exact_code(x, p.offset[c], p.step[c], low, high);
                    }
                }
            }
        }
    }
}

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char* lines,
                                       int (&sums)[kRows][kColumns][4]) {
    const int width = p.heads * HEAD_DIM;
#pragma unroll
    for (int head = 0; head < kWN / HEAD_DIM; head++) {
        const int first = column0 + head * HEAD_DIM, part = first / width, c0 = first + 2 * (lane % 4);
        const float low = part == 0 ? p.low : part == 1 ? p.low_k : p.low_v;
        const float high = part == 0 ? p.high : part == 1 ? p.high_k : p.high_v;
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            float y[kHeadColumns][4];
            int codes[kHeadColumns][4];
#pragma unroll
            for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const int c = c0 + 8 * j + e % 2;
                    y[j][e] = affine(sums[i][head * kHeadColumns + j][e], p.scale[c], p.bias[c]);
                }
            }
            if (RECTIFY && part < 2) {
                rectified(p, y, c0, low, high, part == 0 ? p.margin : p.margin_k, codes);
            } else {
#pragma unroll
                for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) {
                        const int c = c0 + 8 * j + e % 2;
                        codes[j][e] = quotient_code(y[j][e], p.offset[c], p.inverse[c], p.step[c], low, high);
                    }
                }
            }
            const bool doubled = Q_DOUBLED && part == 0;  // c + 1/2, twice
#pragma unroll
            for (int j = 0; j < kHeadColumns; j++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int one = codes[j][2 * half], two = codes[j][2 * half + 1];
                    put(lines, 16 * i + 8 * half + lane / 4, head * HEAD_DIM + 8 * j + 2 * (lane % 4),
                        doubled ? 2 * one + 1 : one, doubled ? 2 * two + 1 : two);
                }
            }
        }
    }
    send(lines, lane, row0, p.m, [&](int row, int column) -> unsigned char* {
        const int c = column0 + column, part = c / width, head = c % width / HEAD_DIM;
        if (part > 2) {
            return nullptr;
        }
        void* const to = part == 0 ? p.out : part == 1 ? p.out_k : p.out_v;
        const size_t line = static_cast<size_t>(row / p.tokens * p.heads + head) * p.tokens + row % p.tokens;
        return static_cast<unsigned char*>(to) + line * HEAD_DIM + c % HEAD_DIM;
    });
}

#endif
#endif
