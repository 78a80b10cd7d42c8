// Codes of q, k and v, in heads; q and k rectified (IRM) before (EPILOGUE 2).
#pragma once

#include "moments.cuh"
#include "send_codes.cuh"

constexpr int kHeadColumns = HEAD_DIM / 8;  // fragments

#if PERMUTED

// Columns are permuted within heads (`slots` in `qvit/engines/cuda/step_tables.py`): a lane's HEAD_DIM / 4 codes of a row lie next
// to each other and go out from registers. `p.steps` has four numbers a column: of a linear one (`ramps.py`)
//     code = byte 3 of min(max(sum + [0], 0), [1]) * [2] + [3],
// and of two rectified ones scale, bias, scale, bias; gain, shift, gain, shift, which lead to codes between 0 and 1.
constexpr int kWords = HEAD_DIM / 16;  // of codes that a lane has in a row
constexpr int kFraction = 16;          // bits behind the point of a rectified code

// Packed bytes of `low` .. from those of 0 ..; twice and one more where `doubled`. No byte carries into the next.
__device__ __forceinline__ uint32_t shifted(uint32_t codes, int low, bool doubled) {
    const uint32_t first = static_cast<uint32_t>(doubled ? 129 + 2 * low : 128 + low);
    return (codes * (doubled ? 2u : 1u) + first * 0x01010101u) ^ 0x80808080u;
}

// Words of a row that a lane has: all of its codes, or a quarter of its values.
struct RowCodes {
    uint32_t at[kWords];
};

// Standardised (row by row) and rounded as defined: a warp computes one row of a head, HEAD_DIM / 32 columns a lane. `own` has the
// lane's values of its quad's row, and the row that is computed is `quad`'s. Returns the codes of a row that are the lane's, with
// the lowest as 0.
__device__ __noinline__ RowCodes exact_row(int quad, const float* weight, const float* affine, const float* offset, const float* step,
                                           double eps, float low, float high, RowCodes own0, RowCodes own1, RowCodes own2,
                                           RowCodes own3) {
    constexpr int kEach = HEAD_DIM / 32;
    const int lane = threadIdx.x % 32;
    float y[kEach] = {};
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 4; i++) {  // column HEAD_DIM / 4 t + i is lane t's of the quad, and goes to lane column / kEach
        const RowCodes& from = i / kWords == 0 ? own0 : i / kWords == 1 ? own1 : i / kWords == 2 ? own2 : own3;
        const uint32_t value = __shfl_sync(kAll, from.at[i % kWords], 4 * quad + lane / 8);
        if (lane % 8 == i / kEach) {
            y[i % kEach] = __int_as_float(static_cast<int>(value));
        }
    }
    // Any value of a row is near enough to its mean: the square of what is between takes two of double's digits.
    const Moments of = moments_near<HEAD_DIM>(y, __shfl_sync(kAll, y[0], 0), eps, [](int) { return true; });
    uint32_t codes = 0;
#pragma unroll 1
    for (int e = 0; e < kEach; e++) {
        const int c = kEach * lane + e;
        const float own = e == 0 ? y[0] : y[kEach - 1];
        const float z = __double2float_rn((static_cast<double>(own) - of.mean) * of.rstd);
        const float x = __fadd_rn(__fmul_rn(z, weight[c]), affine[c]);
        codes |= static_cast<uint32_t>(exact_code(x, offset[c], step[c], low, high) - static_cast<int>(low)) << (8 * e);
    }
    // Four codes a lane, then the words of each lane of a quad.
    if (kEach == 2) {
        codes |= __shfl_xor_sync(kAll, codes, 1) << 16;
    } else {
        codes |= __shfl_xor_sync(kAll, codes, 1) << 8;
        codes |= __shfl_xor_sync(kAll, codes, 2) << 16;
    }
    RowCodes out;
#pragma unroll
    for (int w = 0; w < kWords; w++) {
        out.at[w] = __shfl_sync(kAll, codes, lane % 4 * 8 + w * (4 / kEach));
    }
    return out;
}

// Two rows of one head that a quad holds, from sums to codes with the lowest as 0; `steps`: of its columns.
template <bool kStaged>
__device__ __forceinline__ void rectified(const GemmArgs& p, const int4* steps, const int (&sums)[kColumns][4],
                                          int first_fragment, int first, int part, int lane, uint32_t (&codes)[2][kWords]) {
    const float low = part == 0 ? p.low : p.low_k, high = part == 0 ? p.high : p.high_k;
    const int4* constants = steps + 2 * (lane % 4);
    float y[kHeadColumns][4];
    float sum[2][4] = {}, squares[2][4] = {};  // four of each, so that few roundings are one after the other
#pragma unroll
    for (int j = 0; j < kHeadColumns; j++) {
        const int4 s = read_column<kStaged>(constants + 8 * j);
        const float scale[2] = {__int_as_float(s.x), __int_as_float(s.z)}, bias[2] = {__int_as_float(s.y), __int_as_float(s.w)};
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const float v = __fadd_rn(__fmul_rn(__int2float_rn(sums[first_fragment + j][e]), scale[e % 2]), bias[e % 2]);
            y[j][e] = v;
            sum[e / 2][j % 2 * 2 + e % 2] += v;
            squares[e / 2][j % 2 * 2 + e % 2] = fmaf(v, v, squares[e / 2][j % 2 * 2 + e % 2]);
        }
    }
    float rstd[2], shift[2], whole[2];
    uint32_t reach[2], least[2] = {0xFFFFFFFFu, 0xFFFFFFFFu};
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float(&s)[4] = sum[half], (&q)[4] = squares[half];
        const float mean = quad_sum((s[0] + s[1]) + (s[2] + s[3])) * (1.0f / HEAD_DIM);
        const float square = quad_sum((q[0] + q[1]) + (q[2] + q[3])) * (1.0f / HEAD_DIM);
        rstd[half] = rsqrtf(fmaxf(fmaf(-mean, mean, square), 0.0f) + static_cast<float>(p.eps));
        shift[half] = -mean * rstd[half];
        // Where the mean is large beside the deviation, its square takes digits from the variance.
        const float margin = part == 0 ? fmaf(p.slope, square * rstd[half] * rstd[half], p.margin)
                                       : fmaf(p.slope_k, square * rstd[half] * rstd[half], p.margin_k);
        // In units of the last bit; a value is in doubt that lies within it of the boundary between two codes. Values are made whole
        // numbers of units, as boundaries are, which takes half a unit of the margin.
        const float units = floorf(fminf(margin * (1.001f * (1 << kFraction)), 16384.0f));
        reach[half] = 2 * static_cast<uint32_t>(units);
        whole[half] = 8388608.0f + (1 << (kFraction - 1)) + units;
    }
    const float most = (high - low) * (1 << kFraction);
#pragma unroll
    for (int j = 0; j < kHeadColumns; j++) {
        const int4 s = read_column<kStaged>(constants + 8 * j + 1);
        const float gain[2] = {__int_as_float(s.x), __int_as_float(s.z)}, offset[2] = {__int_as_float(s.y), __int_as_float(s.w)};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t u[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float z = fmaf(y[j][2 * half + e], rstd[half], shift[half]);
                u[e] = static_cast<uint32_t>(__float_as_int(fmaf(__saturatef(fmaf(z, gain[e], offset[e])), most, whole[half])));
            }
            least[half] = __vminu2(least[half], __byte_perm(u[0], u[1], 0x5410));
            const uint32_t pair = __byte_perm(u[0], u[1], 0x0062);
            uint32_t& word = codes[half][j / 2];
            word = j % 2 == 0 ? pair : __byte_perm(word, pair, 0x5410);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const uint32_t nearest = min(least[half] & 0xFFFFu, least[half] >> 16);
        unsigned doubts = __ballot_sync(kAll, nearest <= reach[half] || reach[half] >= 32768u);
        while (doubts != 0) {
            const int quad = (__ffs(static_cast<int>(doubts)) - 1) / 4;
            doubts &= ~(0xFu << (4 * quad));
            RowCodes own[4] = {};
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 4; i++) {
                own[i / kWords].at[i % kWords] = static_cast<uint32_t>(__float_as_int(y[i / 2][2 * half + i % 2]));
            }
            const RowCodes right = exact_row(quad, p.weight + first, p.affine + first, p.offset + first, p.step + first, p.eps, low,
                                             high, own[0], own[1], own[2], own[3]);
            if (lane / 4 == quad) {
#pragma unroll
                for (int w = 0; w < kWords; w++) {
                    codes[half][w] = right.at[w];
                }
            }
        }
    }
}

// The same of columns whose codes follow from the sum alone.
template <bool kStaged>
__device__ __forceinline__ void linear(const int4* steps, const int (&sums)[kColumns][4], int first_fragment, int lane,
                                       uint32_t (&codes)[2][kWords]) {
    const int4* constants = steps + 2 * (lane % 4);
#pragma unroll
    for (int j = 0; j < kHeadColumns; j++) {
        const int4 ramp[2] = {read_column<kStaged>(constants + 8 * j), read_column<kStaged>(constants + 8 * j + 1)};
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32_t u[2];
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const uint32_t w = static_cast<uint32_t>(clamp_sum(sums[first_fragment + j][2 * half + e], ramp[e].x, ramp[e].y));
                u[e] = w * static_cast<uint32_t>(ramp[e].z) + static_cast<uint32_t>(ramp[e].w);
            }
            const uint32_t pair = __byte_perm(u[0], u[1], 0x0073);
            uint32_t& word = codes[half][j / 2];
            word = j % 2 == 0 ? pair : __byte_perm(word, pair, 0x5410);
        }
    }
}

// Where the first head's line of a row is, or -1 behind the last row.
__device__ __forceinline__ int line_of(const GemmArgs& p, int row) {
    int image = static_cast<int>(__umulhi(static_cast<uint32_t>(row), p.tokens_inverse));
    int token = row - image * p.tokens;
    if (token >= p.tokens) {  // the product with the inverse is at most one too low
        image++;
        token -= p.tokens;
    }
    return row < p.m ? image * p.heads * p.tokens + token : -1;
}

__device__ __forceinline__ void store(unsigned char* to, const uint32_t (&words)[kWords]) {
#if HEAD_DIM == 64
    *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
#else
    *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
#endif
}

constexpr int kColumnBytes = 16 * kWN;

// `columns`: what is known of them, in shared memory where kStaged.
template <bool kStaged>
__device__ __forceinline__ void finish_columns(const GemmArgs& p, int row0, int column0, int lane, const unsigned char* columns,
                                               int (&sums)[kRows][kColumns][4]) {
    const int4* const steps = reinterpret_cast<const int4*>(columns);
    const int width = p.heads * HEAD_DIM;
    int part = (column0 >= width) + (column0 >= 2 * width) + (column0 >= 3 * width);  // a division takes longer
    int head = (column0 - part * width) / HEAD_DIM;
    int at[kRows][2];
#pragma unroll
    for (int i = 0; i < kRows; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            at[i][half] = line_of(p, row0 + 16 * i + 8 * half + lane / 4);
        }
    }
#pragma unroll
    for (int h = 0; h < kWN / HEAD_DIM; h++) {
        const bool doubled = Q_DOUBLED && part == 0;
        unsigned char* out = static_cast<unsigned char*>(part == 0 ? p.out : part == 1 ? p.out_k : p.out_v);
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            uint32_t codes[2][kWords];
            if (RECTIFY && part < 2) {
                rectified<kStaged>(p, steps + h * HEAD_DIM, sums[i], h * kHeadColumns, column0 + h * HEAD_DIM, part, lane, codes);
            } else {
                linear<kStaged>(steps + h * HEAD_DIM, sums[i], h * kHeadColumns, lane, codes);
            }
            const bool moves = doubled || (RECTIFY && part < 2);
            const int low = code_of(part == 0 ? p.low : p.low_k);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (moves) {
#pragma unroll
                    for (int w = 0; w < kWords; w++) {
                        codes[half][w] = shifted(codes[half][w], low, doubled);
                    }
                }
                if (at[i][half] >= 0 && part < 3) {
                    const size_t line = static_cast<size_t>(at[i][half]) + head * p.tokens;
                    store(out + line * HEAD_DIM + lane % 4 * (HEAD_DIM / 4), codes[half]);
                }
            }
        }
        if (++head == p.heads) {
            head = 0;
            part++;
        }
    }
}

__device__ __forceinline__ const unsigned char* columns_of(const GemmArgs& p, int column0) {
    return reinterpret_cast<const unsigned char*>(p.steps + column0);
}

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char* lines,
                                       int (&sums)[kRows][kColumns][4]) {
    finish_columns<false>(p, row0, column0, lane, columns_of(p, column0), sums);
}

#else

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
