// A tile's sums on their way to codes, turn by turn (`FinishColumns` of the epilogue that includes this).
#pragma once

// `columns`: what is known of the tile's, in shared memory where kStaged.
template <bool kStaged>
__device__ __forceinline__ void finish_columns(const GemmArgs& p, int row0, int column0, int lane, const unsigned char* columns,
                                               const int (&sums)[kRows][kColumns][4]) {
    FinishColumns<kStaged> of;
    of.begin(p, row0, column0, lane);
#pragma unroll
    for (int turn = 0; turn < FinishColumns<kStaged>::kTurns; turn++) {
        of.turn(turn, p, row0, column0, lane, columns, sums);
    }
}

__device__ __forceinline__ void finish(const GemmArgs& p, int row0, int column0, int lane, unsigned char*,
                                       const int (&sums)[kRows][kColumns][4]) {
    finish_columns<false>(p, row0, column0, lane, columns_of(p, column0), sums);
}
