// Products of codes on byte tensor cores, with everything up to the next codes (or floats) in the epilogue.
//
//     sums[M, N] = a[M, K] b[N, K]^T,   y = sums * scale[n] + bias[n]
//
// A block of kWarpsM x kWarpsN warps computes a tile of kBM x kBN sums; each warp has its own part of it, whose columns are whole
// attention heads. Tiles of a and b come through kStages buffers of shared memory, kBK bytes of k at a time; the 16-byte pieces
// of a row are permuted (`place`), so that ldmatrix finds its eight rows in different banks.
//
// Compiled once a shape and epilogue; the constants in capitals come from `qvit/engines/cuda/kernels.py`.
#include "rounding.cuh"

struct GemmArgs {
    const uint8_t* a;         // codes [M, lda], rows padded with anything to a multiple of kBK
    const int8_t* b;          // codes [N padded to kBN, ldb], padded with zeros
    const float* scale;       // [N padded]: scale_x * scale_w
    const float* bias;        // [N padded]: folded bias
    void* out;                // codes [M, ldo], floats [.., ldo], or q [B, H, N, D]
    void* out_k;              // the same of k and v
    void* out_v;
    const float* residual;    // floats: added; may be `out`
    const float* gamma;       // floats: LayerScale [N], or nothing
    const float* position;    // floats: added after all, [rows_out, N], or nothing
    const float* inverse;     // codes: 1 / step of the next input, or gain of rectified heads [N]
    const float* offset;      // codes: offset of the next input [N]
    const float* step;        // codes: step of the next input [N]
    const float* shift;       // rectified heads: [N]
    const float* weight;      // rectified heads: affine part, [N]
    const float* affine;
    int m, n, k, lda, ldb, ldo;
    int rows_in, rows_out, row_first;  // floats: row r goes to r / rows_in * rows_out + row_first + r % rows_in
    int heads, tokens;                 // heads: row r is token r % tokens of image r / tokens
    float low, high, margin;           // of the next codes
    float low_k, high_k, margin_k, low_v, high_v;
    double eps;                        // of the rectified heads
};

constexpr int kThreads = 32 * kWarpsM * kWarpsN;
constexpr int kWM = kBM / kWarpsM, kWN = kBN / kWarpsN;  // a warp's part
constexpr int kRows = kWM / 16, kColumns = kWN / 8;      // in fragments
constexpr int kPieces = kBK / 16;                        // of a row of a tile
constexpr int kStageBytes = (kBM + kBN) * kBK;
constexpr int kLine = kWN + 16;  // bytes of a row of codes on their way out; the padding spreads banks

// Where piece p of row r of a tile lies.
__device__ __forceinline__ int place(int row, int piece) {
    constexpr int kPeriod = kPieces == 2 ? 4 : kPieces == 4 ? 2 : 1;  // rows of 128 bytes
    return row * kBK + 16 * (piece ^ (row / kPeriod) % kPieces);
}

__device__ __forceinline__ void fetch(const GemmArgs& p, unsigned char* stage, int row0, int column0, int k0) {
#pragma unroll
    for (int i = threadIdx.x; i < kBM * kPieces; i += kThreads) {
        const int row = i / kPieces, piece = i % kPieces;
        const bool wanted = row0 + row < p.m;
        const size_t from = static_cast<size_t>(wanted ? row0 + row : 0) * p.lda + k0 + 16 * piece;
        copy_async(stage + place(row, piece), p.a + from, wanted);
    }
#pragma unroll
    for (int i = threadIdx.x; i < kBN * kPieces; i += kThreads) {
        const int row = i / kPieces, piece = i % kPieces;
        const size_t from = static_cast<size_t>(column0 + row) * p.ldb + k0 + 16 * piece;
        copy_async(stage + kBM * kBK + place(row, piece), p.b + from, true);
    }
}

// One stage's share of the sums.
__device__ __forceinline__ void accumulate(const unsigned char* stage, int warp_row, int warp_column, int lane,
                                           int (&sums)[kRows][kColumns][4]) {
    const unsigned char* b_tile = stage + kBM * kBK;
#pragma unroll
    for (int k = 0; k < kPieces; k += 2) {
        uint32_t a[kRows][4], b[kColumns / 2][4];
#pragma unroll
        for (int i = 0; i < kRows; i++) {
            load_matrices(a[i], stage + place(warp_row + 16 * i + lane % 16, k + lane / 16));
        }
#pragma unroll
        for (int j = 0; j < kColumns / 2; j++) {
            load_matrices(b[j], b_tile + place(warp_column + 16 * j + lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
        }
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int j = 0; j < kColumns; j++) {
                const uint32_t part[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
                multiply<A_SIGNED>(sums[i][j], a[i], part);
            }
        }
    }
}

// y, in the reference engine's roundings. Half-step weights count twice: their codes are 2 c + 1 and the sums are halved.
__device__ __forceinline__ float affine(int sum, float scale, float bias) {
    const float whole = __int2float_rn(sum);
    return __fadd_rn(__fmul_rn(W_HALF ? 0.5f * whole : whole, scale), bias);
}

#if EPILOGUE == 0  // floats

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char*,
                                       int (&sums)[kRows][kColumns][4]) {
    float* out = static_cast<float*>(p.out);
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
        const int c = column0 + 8 * j + 2 * (lane % 4);
        const float scale[2] = {p.scale[c], p.scale[c + 1]}, bias[2] = {p.bias[c], p.bias[c + 1]};
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int r = row0 + 16 * i + 8 * half + lane / 4;
                if (r < p.m) {
                    const int to = r / p.rows_in * p.rows_out + p.row_first + r % p.rows_in;
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        if (c + e < p.n) {
                            float y = affine(sums[i][j][2 * half + e], scale[e], bias[e]);
                            const size_t at = static_cast<size_t>(to) * p.ldo + c + e;
                            if (p.gamma) {
                                y = __fmul_rn(y, p.gamma[c + e]);
                            }
                            if (p.residual) {
                                y = __fadd_rn(p.residual[at], y);
                            }
                            if (p.position) {
                                y = __fadd_rn(y, p.position[static_cast<size_t>(to % p.rows_out) * p.n + c + e]);
                            }
                            out[at] = HALVED ? 0.5f * y : y;
                        }
                    }
                }
            }
        }
    }
}

#else  // codes

// A warp's codes [kWM][kWN], which lie in `lines`, go out in pieces of 16 bytes.
template <class Where>
__device__ __forceinline__ void send(const unsigned char* lines, int lane, int row0, int rows, const Where& where) {
    __syncwarp();
    for (int i = lane; i < kWM * (kWN / 16); i += 32) {
        const int row = i / (kWN / 16), piece = i % (kWN / 16);
        if (row0 + row < rows) {
            if (unsigned char* to = where(row0 + row, 16 * piece)) {
                *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(lines + row * kLine + 16 * piece);
            }
        }
    }
}

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

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char* lines,
                                       int (&sums)[kRows][kColumns][4]) {
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
        const int c = column0 + 8 * j + 2 * (lane % 4);
        float scale[2], bias[2], inverse[2], offset[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            scale[e] = p.scale[c + e], bias[e] = p.bias[c + e], inverse[e] = p.inverse[c + e], offset[e] = p.offset[c + e];
        }
#pragma unroll
        for (int i = 0; i < kRows; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int codes[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    codes[e] = activation_code(p, sums[i][j][2 * half + e], c + e, scale[e], bias[e], inverse[e], offset[e]);
                }
                put(lines, 16 * i + 8 * half + lane / 4, 8 * j + 2 * (lane % 4), codes[0], codes[1]);
            }
        }
    }
    send(lines, lane, row0, p.m, [&](int row, int column) -> unsigned char* {
        const int c = column0 + column;
        return c < p.n ? static_cast<unsigned char*>(p.out) + static_cast<size_t>(row) * p.ldo + c : nullptr;
    });
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

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads) kernel(const GemmArgs p) {
    QVIT_SHARED(memory);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tiles_n = (p.n + kBN - 1) / kBN;
    const int row0 = blockIdx.x / tiles_n * kBM, column0 = blockIdx.x % tiles_n * kBN;
    const int warp_row = warp / kWarpsN * kWM, warp_column = warp % kWarpsN * kWN;
    int sums[kRows][kColumns][4];
#pragma unroll
    for (int i = 0; i < kRows; i++) {
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                sums[i][j][e] = 0;
            }
        }
    }
    const int steps = (p.k + kBK - 1) / kBK;
#pragma unroll
    for (int s = 0; s < kStages - 1; s++) {
        if (s < steps) {
            fetch(p, memory + s * kStageBytes, row0, column0, s * kBK);
        }
        copies_end_group();
    }
    for (int s = 0; s < steps; s++) {
        copies_wait<kStages - 2>();
        __syncthreads();  // this stage has come, and all are done with the one before
        const int next = s + kStages - 1;
        if (next < steps) {
            fetch(p, memory + next % kStages * kStageBytes, row0, column0, next * kBK);
        }
        copies_end_group();
        accumulate(memory + s % kStages * kStageBytes, warp_row, warp_column, lane, sums);
    }
    __syncthreads();  // codes on their way out lie where the tiles were
    finish(p, row0 + warp_row, column0 + warp_column, lane, memory + warp * kWM * kLine, sums);
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const GemmArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
