// A warpgroup's products of what lies in buffers: of bytes, or of planes of bits (BITS).
#pragma once

#include "hopper_buffers.cuh"

union Sums {
    int parts[kParts][kPart / 2];
    int fragments[kRows][kColumns][4];
};

__device__ __forceinline__ void settle(Sums& sums) {
#pragma unroll
    for (int part = 0; part < kParts; part++) {
        settle(sums.parts[part]);
    }
}

// Where a warpgroup is in its work: the buffers it reads, and what it has to say when they have been read.
struct Reader {
    const Buffers& of;
    Operand rows, stages;  // the first ones
    int team, lane;
    bool fresh;  // these rows are read for the first time
    int rows_phase = 1;
    Cursor<kStages> cursor;
    Cursor<kRowBuffers> row_cursor;  // where rows do not stay

    // This warpgroup's rows of a chunk.
    __device__ __forceinline__ Operand await_rows(int chunk) const {
        const int at = RESIDENT ? chunk : row_cursor.at;
        if (!RESIDENT || fresh) {
            barrier_wait(&of.barriers->rows_full[team][at], RESIDENT ? rows_phase : row_cursor.phase);
        }
        return advance(rows, at * kBytesA);
    }
    __device__ __forceinline__ Operand await_stage() const {
        barrier_wait(&of.barriers->full[cursor.at], B_STAYS ? 0 : cursor.phase);
        return advance(stages, cursor.at * kStage);
    }
    __device__ __forceinline__ void release(int stage) const {
        if (!B_STAYS && lane == 0) {
            barrier_arrive(&of.barriers->empty[stage]);
        }
    }
    __device__ __forceinline__ void release_rows(int at) const {
        if (lane == 0) {
            barrier_arrive(&of.barriers->rows_empty[team][at]);
        }
    }
};

#if BITS

// One plane of a against one of b, over all of k.
__device__ __forceinline__ void multiply_planes(Sums& sums, Operand rows, Operand stage, int plane_a, int plane_b, bool add) {
#pragma unroll
    for (int k = 0; k < DEPTH; k += 64) {
        const int chunk = k / kChunk, from = k % kChunk;
        const Operand a = advance(rows, chunk * kBytesA), b = advance(stage, chunk * kBytesB);
#pragma unroll
        for (int part = 0; part < kParts; part++) {
            warpgroup_multiply_bits<kPart>(sums.parts[part], advance(a, from + 32 * (1 - plane_a)),
                                           advance(b, part * kPart * kChunk + from + 32 * (1 - plane_b)), add || k > 0);
        }
    }
}

// What `issue` issues, from begin to end; `meanwhile` is done before they are waited for.
template <class Issue, class Meanwhile>
__device__ __forceinline__ void multiply_and_wait(Sums& sums, const Issue& issue, const Meanwhile& meanwhile) {
    settle(sums);
    products_begin();
    issue();
    products_end_group();
    meanwhile();
    products_wait<0>();
    settle(sums);
}

template <class Change>
__device__ __forceinline__ void change(Sums& sums, const Change& how) {
#pragma unroll
    for (int part = 0; part < kParts; part++) {
#pragma unroll
        for (int i = 0; i < kPart / 2; i++) {
            sums.parts[part][i] = how(sums.parts[part][i]);
        }
    }
}

// a = 2 a1 + a0 and b = -2 b1 + b0, so a b = -2 (2 a1 b1 + a0 b1) + 2 a1 b0 + a0 b0. Twice a product is the product twice: a half
// more of them, which the tensor cores have time for, and two waits and one pass over the sums in place of four and three.
constexpr int kSlices = TWICE ? 2 : 4;
template <class Meanwhile>
__device__ __forceinline__ void multiply_all(Reader& reader, Sums& sums, const Meanwhile& meanwhile) {
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
        reader.await_rows(chunk);
    }
    const Operand stage = reader.await_stage(), rows = reader.rows;
    const auto multiply = [&](int plane_a, int plane_b, bool add) { multiply_planes(sums, rows, stage, plane_a, plane_b, add); };
    if (TWICE) {
        multiply_and_wait(
            sums, [&] { multiply(1, 1, false), multiply(1, 1, true), multiply(0, 1, true); }, [&] { meanwhile(0); });
        change(sums, [](int x) { return -2 * x; });
        multiply_and_wait(
            sums, [&] { multiply(1, 0, true), multiply(1, 0, true), multiply(0, 0, true); }, [&] { meanwhile(1); });
    } else {
        multiply_and_wait(sums, [&] { multiply(1, 1, false); }, [&] { meanwhile(0); });
        change(sums, [](int x) { return 2 * x; });
        multiply_and_wait(sums, [&] { multiply(0, 1, true); }, [&] { meanwhile(1); });
        change(sums, [](int x) { return -x; });
        multiply_and_wait(sums, [&] { multiply(1, 0, true); }, [&] { meanwhile(2); });
        change(sums, [](int x) { return 2 * x; });
        multiply_and_wait(sums, [&] { multiply(0, 0, true); }, [&] { meanwhile(3); });
    }
    reader.release(reader.cursor.at);
    reader.cursor.next();
}

#else

// `meanwhile(slice)` is called kSlices times while products are made.
constexpr int kSlices = kChunks;
template <class Meanwhile>
__device__ __forceinline__ void multiply_all(Reader& reader, Sums& sums, const Meanwhile& meanwhile) {
    int before = -1, rows_before = -1;
    reader.cursor.begin<kChunks * kUnits>();
    reader.row_cursor.begin<kChunks>();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
        const Operand a = reader.await_rows(chunk);
#pragma unroll
        for (int part = 0; part < kParts; part++) {
            const Operand b = reader.await_stage();
            settle(sums);
            products_begin();
#pragma unroll
            for (int k = 0; k < kChunk; k += 32) {
                if (chunk * kChunk + k < DEPTH) {
                    warpgroup_multiply<kPart, A_SIGNED>(sums.parts[part], advance(a, k), advance(b, k), chunk + k > 0);
                }
            }
            products_end_group();
            if (chunk + part > 0) {
                products_wait<1>();  // those of the buffer before are done
                reader.release(before);
                if (!RESIDENT && part == 0) {
                    reader.release_rows(rows_before);
                }
            }
            // Behind the release of what has been read: buffers are scarcer than time.
            if (part == kParts - 1) {
                meanwhile(chunk);
            }
            before = reader.cursor.at;
            reader.cursor.next();
        }
        rows_before = reader.row_cursor.at;
        reader.row_cursor.next();
    }
    products_wait<0>();
    settle(sums);
    reader.release(before);
    if (!RESIDENT) {
        reader.release_rows(rows_before);
    }
}

#endif
