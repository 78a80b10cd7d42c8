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

// Where a lane's codes are in the first buffer of rows, where it reads them itself: two neighbouring pieces of every 256 k.
__device__ __forceinline__ const unsigned char* lines_of(const unsigned char* rows, int warp, int lane) {
    return rows + warp * 16 * kChunk + lane / 4 * kChunk + ((2 * (lane % 4)) ^ (lane / 4)) * 16;
}

// Where a warpgroup is in its work: the buffers it reads, and what it has to say when they have been read.
struct Reader {
    const Buffers& of;
    Operand rows, stages;  // the first ones
    const unsigned char* lines;  // of the first rows, where this lane reads codes itself
    int team, lane;
    bool fresh;        // these rows are read for the first time
    bool last = false;  // or for the last time
    int rows_phase = 1;
    int less = -2;  // which the compiler is not to know: it would take two instructions to multiply by it
    Cursor<kStages> cursor;
    Cursor<kRowBuffers> row_cursor;  // where rows do not stay
#if HELD
    uint32_t held[kChunks * kChunk / 32][4];  // operands of all of a row block, in registers
#endif

    // Which buffer has this warpgroup's rows of a chunk of a's.
    __device__ __forceinline__ int await_rows_at(int chunk) const {
        const int at = RESIDENT ? chunk : row_cursor.at();
        if (!RESIDENT || fresh) {
            barrier_wait(&of.barriers->rows_full[team][at], RESIDENT ? rows_phase : row_cursor.phase());
        }
        return at;
    }
    __device__ __forceinline__ Operand await_rows(int chunk) const { return advance(rows, await_rows_at(chunk) * kBytesA); }
    __device__ __forceinline__ Operand await_stage() const {
        barrier_wait(&of.barriers->full[cursor.at()], B_STAYS ? 0 : cursor.phase());
        return advance(stages, cursor.at() * kStage);
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

// REST: behind whole 256 columns of bits are at most 128. An operand has room for both planes of a's, next to each other, and b has
// those columns twice (`rest_twice` in `qvit/engines/cuda/layout.py`). The other operand has the high bits alone, which count twice.
constexpr int kRest = REST ? DEPTH - 64 : DEPTH;
static_assert(!REST || (BITS && TWICE && HELD), "of one-bit products");

#if HELD
// Rows that stay do so in registers: the tensor cores then read of shared memory what is of b, which leaves its time to epilogues.
static_assert(RESIDENT && kParts == 1 && !A_SIGNED && kTeams == 1, "rows that stay, of bits or of bytes without a sign");

__device__ __forceinline__ void hold_rows(Reader& reader) {
    const int row = threadIdx.x % 128 / 32 * 16 + reader.lane % 16;
    const unsigned char* const line = reader.of.rows + threadIdx.x / 128 * kTileBytes + row * kChunk;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
        reader.await_rows(chunk);
#pragma unroll
        for (int step = 0; step < kChunk / 32; step++) {
            const int at = chunk * kChunk + 32 * step, second = at == kRest ? 2 : 1;  // piece beside the first one
            uint32_t(&to)[4] = reader.held[at / 32];
            if (at < DEPTH && at <= kRest) {
                load_matrices(to, line + chunk * kBytesA + ((2 * step + reader.lane / 16 * second) ^ (reader.lane % 8)) * 16);
            } else if (at < DEPTH) {
                to[0] = reader.held[kRest / 32][0], to[1] = reader.held[kRest / 32][1], to[2] = to[3] = 0;
                settle(to[0], to[1]);  // registers of their own: else they are made anew for every product
                settle(to[2], to[3]);
            }
        }
    }
    __syncwarp();
    reader.release_rows(0);
}
#endif

#if BITS

// One plane of a against one of b, over all of k but REST.
__device__ __forceinline__ void multiply_planes(Sums& sums, const Reader& reader, Operand stage, int plane_a, int plane_b, bool add) {
#pragma unroll
    for (int k = 0; k < kRest; k += 64) {
        const int chunk = k / kChunk, from_a = k % kChunk + 32 * (1 - plane_a), from_b = k % kChunk + 32 * (1 - plane_b);
        const Operand b = advance(stage, chunk * kBytesB + from_b);
#pragma unroll
        for (int part = 0; part < kParts; part++) {
#if HELD
            warpgroup_multiply_bits_held<kPart>(sums.parts[part], reader.held[(chunk * kChunk + from_a) / 32], b, add || k > 0);
#else
            warpgroup_multiply_bits<kPart>(sums.parts[part], advance(reader.rows, chunk * kBytesA + from_a),
                                           advance(b, part * kPart * kChunk), add || k > 0);
#endif
        }
    }
}

// Twice the high bits of a and once its low ones, against one plane of b.
__device__ __forceinline__ void multiply_thrice(Sums& sums, const Reader& reader, Operand stage, int plane_b, bool add) {
    multiply_planes(sums, reader, stage, 1, plane_b, add);
    multiply_planes(sums, reader, stage, 1, plane_b, true);
    multiply_planes(sums, reader, stage, 0, plane_b, true);
#if REST
    const Operand b = advance(stage, kRest / kChunk * kBytesB + kRest % kChunk + 32 * (1 - plane_b));
    warpgroup_multiply_bits_held<kPart>(sums.parts[0], reader.held[kRest / 32], b, add || kRest > 0);
    warpgroup_multiply_bits_held<kPart>(sums.parts[0], reader.held[kRest / 32 + 1], b, true);
#endif
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
#if HELD
    if (reader.fresh) {
        hold_rows(reader);
    }
#else
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
        reader.await_rows(chunk);
    }
#endif
    const Operand stage = reader.await_stage();
    const auto multiply = [&](int plane_a, int plane_b, bool add) { multiply_planes(sums, reader, stage, plane_a, plane_b, add); };
    if (TWICE) {
        const int less = reader.less;
        multiply_and_wait(sums, [&] { multiply_thrice(sums, reader, stage, 1, false); }, [&] { meanwhile(0); });
        change(sums, [less](int x) { return less * x; });
        multiply_and_wait(sums, [&] { multiply_thrice(sums, reader, stage, 0, true); }, [&] { meanwhile(1); });
    } else {
        multiply_and_wait(sums, [&] { multiply(1, 1, false); }, [&] { meanwhile(0); });
        change(sums, [](int x) { return 2 * x; });
        multiply_and_wait(sums, [&] { multiply(0, 1, true); }, [&] { meanwhile(1); });
        change(sums, [](int x) { return -x; });
        multiply_and_wait(sums, [&] { multiply(1, 0, true); }, [&] { meanwhile(2); });
        change(sums, [](int x) { return 2 * x; });
        multiply_and_wait(sums, [&] { multiply(0, 0, true); }, [&] { meanwhile(3); });
    }
    reader.release(reader.cursor.at());
    reader.cursor.next();
}

#elif A_NIBBLES

// Codes of a two a byte: a lane loads those of its two rows, makes operands of them in its registers and multiplies from there. A sum
// over k does not care for the order of k, so the weights' k are permuted on the host (`nibble_order` in
// `qvit/engines/cuda/layout.py`) such that the lower halves of a loaded word are one word of an operand, and its higher halves
// another one. Of 256 k a lane has the bytes 32 (lane % 4) .. of a row, whose pieces are in different banks for eight lanes.

constexpr int kSlices = kChunks;
constexpr int kSteps = kChunk / 32;  // products of a buffer of b
// So many products are under way, each a group with registers of its own, which stay as they are until it is waited for: those of a
// buffer of b. With two DeiT-S takes longer (5.857 in place of 5.829 ms at batch 256 on an H100).
constexpr int kFlight = 4;
static_assert(kSteps % kFlight == 0, "products of all buffers take the same registers");

template <class Meanwhile>
__device__ __forceinline__ void multiply_all(Reader& reader, Sums& sums, const Meanwhile& meanwhile) {
    int before = -1;
    uint32_t operands[kFlight][4];
    const unsigned char* line = nullptr;
    const int beside = reader.lane / 4 % 2 == 0 ? 16 : -16;  // to the piece with the second half of 256 k
    reader.cursor.begin<kChunks>();
    reader.row_cursor.begin<kRowChunks>();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
        if (chunk % 2 == 0) {
            line = reader.lines + reader.await_rows_at(chunk / 2) * kBytesA;
        }
        const unsigned char* const from = line + (chunk % 2 == 0 ? 0 : beside);
        const uint4 upper = *reinterpret_cast<const uint4*>(from), lower = *reinterpret_cast<const uint4*>(from + 8 * kChunk);
        uint32_t codes[2][kSteps] = {{upper.x, upper.y, upper.z, upper.w}, {lower.x, lower.y, lower.z, lower.w}};
        const Operand b = reader.await_stage();
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
            uint32_t(&a)[4] = operands[step % kFlight];
            if (chunk * kSteps + step >= kFlight) {
                products_wait<kFlight - 1>();  // the one that read these registers is done
            }
            if (step == kFlight - 1 && chunk > 0) {
                reader.release(before);
            }
            settle(codes[0][step], codes[1][step]);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                a[half] = codes[half][step] & 0x0F0F0F0Fu;
                a[2 + half] = codes[half][step] >> 4 & 0x0F0F0F0Fu;
            }
            settle(sums);
            products_begin();
            warpgroup_multiply_held<kPart>(sums.parts[0], a, advance(b, 32 * step), chunk + step > 0);
            products_end_group();
        }
        if (chunk % 2 == 1 && (!RESIDENT || reader.last)) {
            __syncwarp();
            reader.release_rows(RESIDENT ? chunk / 2 : reader.row_cursor.at());
        }
        if (chunk % 2 == 1) {
            reader.row_cursor.next();
        }
        meanwhile(chunk);
        before = reader.cursor.at();
        reader.cursor.next();
    }
    products_wait<0>();
    settle(sums);
    reader.release(before);
}

#elif HELD

constexpr int kSlices = kChunks;
template <class Meanwhile>
__device__ __forceinline__ void multiply_all(Reader& reader, Sums& sums, const Meanwhile& meanwhile) {
    if (reader.fresh) {
        hold_rows(reader);
    }
    int before = -1;
    reader.cursor.begin<kChunks>();
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk++) {
        const Operand b = reader.await_stage();
        settle(sums);
        products_begin();
#pragma unroll
        for (int k = 0; k < kChunk; k += 32) {
            if (chunk * kChunk + k < DEPTH) {
                warpgroup_multiply_held<kPart>(sums.parts[0], reader.held[(chunk * kChunk + k) / 32], advance(b, k), chunk + k > 0);
            }
        }
        products_end_group();
        if (chunk > 0) {
            products_wait<1>();  // those of the buffer before are done
            reader.release(before);
        }
        meanwhile(chunk);
        before = reader.cursor.at();
        reader.cursor.next();
    }
    products_wait<0>();
    settle(sums);
    reader.release(before);
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
            before = reader.cursor.at();
            reader.cursor.next();
        }
        rows_before = reader.row_cursor.at();
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
