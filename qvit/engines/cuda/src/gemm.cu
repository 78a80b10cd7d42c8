// Products of codes on byte tensor cores (mma.sync), for every GPU from Ampere on.
//
//     sums[M, N] = a[M, K] b[N, K]^T,   y = sums * scale[n] + bias[n]
//
// A block of kWarpsM x kWarpsN warps computes a tile of kBM x kBN sums; each warp has its own part of it, whose columns are whole
// attention heads. Tiles of a and b come through kStages buffers of shared memory, kBK bytes of k at a time; the 16-byte pieces
// of a row are permuted (`place`), so that ldmatrix finds its eight rows in different banks.
//
// Compiled once a shape and epilogue; the constants in capitals come from `qvit/engines/cuda/products.py` and `tiles.py`.

constexpr int kThreads = 32 * kWarpsM * kWarpsN;
constexpr int kWM = kBM / kWarpsM, kWN = kBN / kWarpsN;  // a warp's part
constexpr int kRows = kWM / 16, kColumns = kWN / 8;      // in fragments
constexpr int kPieces = kBK / 16;                        // of a row of a tile
constexpr int kStageBytes = (kBM + kBN) * kBK;

#include "epilogue.cuh"

// Where piece p of row r of a tile lies.
__device__ __forceinline__ int place(int row, int piece) {
    constexpr int kPeriod = kPieces == 2 ? 4 : kPieces == 4 ? 2 : 1;  // rows of 128 bytes
    return row * kBK + 16 * (piece ^ (row / kPeriod) % kPieces);
}

__device__ __forceinline__ void fetch(const GemmArgs& p, unsigned char* stage, int row0, int column0, int k0) {
    const int chunks = (p.k + kChunk - 1) / kChunk;
#pragma unroll
    for (int i = threadIdx.x; i < kBM * kPieces; i += kThreads) {
        const int row = i / kPieces, piece = i % kPieces;
        copy_async(stage + place(row, piece), p.a + code_at(row0 + row, k0 + 16 * piece, chunks), true);
    }
#pragma unroll
    for (int i = threadIdx.x; i < kBN * kPieces; i += kThreads) {
        const int row = i / kPieces, piece = i % kPieces;
        copy_async(stage + kBM * kBK + place(row, piece), p.b + code_at(column0 + row, k0 + 16 * piece, chunks), true);
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

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads) kernel(const GemmArgs p) {
    await_former_kernel();
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
