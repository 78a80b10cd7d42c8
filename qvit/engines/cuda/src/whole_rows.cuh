// Rows of floats behind a product of whole rows (DIRECT): what is added comes into registers, sums go out from them.
//
// b's columns are permuted (`slots` in `qvit/engines/cuda/step_tables.py`), so that the four that a lane has of every sixteen are
// neighbours: 16 bytes, and a quad's are whole sectors. A unit is four such floats of one of the lane's two rows. Units are loaded
// in batches of kAhead, one load behind the other: whoever waits for a load waits for all that share its scoreboard, of which a
// warp has few, so a load that is issued while others are used would make them wait too. The first batch is on its way from
// before the products on where RESIDUAL_EARLY, each other one from when the one before it has been added up.
#pragma once

constexpr int kUnitsOfTile = kBN / 8;  // of a lane: even ones are of row lane / 4, odd ones of the row eight below
static_assert(kAhead % 2 == 0 && kAhead <= kUnitsOfTile, "a batch is of both rows");
static_assert(!(RESIDUAL && POSITION), "one thing is added");
using Added = StreamOf<OUT_HALF && !POSITION>::type;  // a position is float32

// As they were loaded; they become floats where they are used, so that nothing waits for them before.
template <class T>
struct FourOf {
    uint32_t words[sizeof(T)];

    __device__ __forceinline__ void get(float (&x)[4]) const {
        if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                x[e] = __int_as_float(static_cast<int>(words[e]));
            }
        } else {
            from_halves(words[0], x[0], x[1]);
            from_halves(words[1], x[2], x[3]);
        }
    }
};

// Loads stay where they are among other loads and waits.
__device__ __forceinline__ FourOf<float> load_four(const float* from) {
    FourOf<float> to;
#ifdef QVIT_EMULATION
    memcpy(to.words, from, sizeof to.words);
#else
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.words[0]), "=r"(to.words[1]), "=r"(to.words[2]), "=r"(to.words[3])
                 : "l"(from));
#endif
    return to;
}
__device__ __forceinline__ FourOf<Half> load_four(const Half* from) {
    FourOf<Half> to;
#ifdef QVIT_EMULATION
    memcpy(to.words, from, sizeof to.words);
#else
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(to.words[0]), "=r"(to.words[1]) : "l"(from));
#endif
    return to;
}

// A lane's part of a tile: four neighbours of every sixteen columns of rows `row` and `row + 8`.
struct Part {
    int row, rows;
    const Added* from[2];  // what is added; of a row that is there in any case
    Stream* to[2];
    FourOf<Added> ahead[kAhead];

    // Loads come under way. The part of a warp whose first row is row0.
    __device__ __forceinline__ void begin(const GemmArgs& p, int row0, int lane) {
        row = row0 + lane / 4, rows = p.m;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int r = min(row + 8 * half, p.m - 1), c = 4 * (lane % 4);
            const int inside = POSITION ? p.row_first + r % p.rows_in : 0;
            const int moved = POSITION ? r / p.rows_in * p.rows_out + inside : float_row(p, r);
            to[half] = static_cast<Stream*>(p.out) + static_cast<size_t>(moved) * LDO + c;
            const void* other = nullptr;
            if (POSITION) {
                other = p.position + static_cast<size_t>(inside) * LDO + c;
            } else if (RESIDUAL) {
                other = p.residual + static_cast<size_t>(moved) * LDO + c;
            }
            from[half] = static_cast<const Added*>(other);
        }
        fetch(0);
    }
    __device__ __forceinline__ bool is_there(int half) const { return row + 8 * half < rows; }
    // The batch of unit `first`, none behind the last unit. Loads do not move across a warp's barrier: without, ptxas issues some
    // later, among the uses of others.
    __device__ __forceinline__ void fetch(int first) {
        if constexpr (RESIDUAL || POSITION) {
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kAhead; i++) {
                const int unit = first + i;
                if (unit < kUnitsOfTile) {
                    ahead[i] = load_four(from[unit % 2] + unit / 2 * 16);
                }
            }
            __syncwarp();
        }
    }
    // y of a unit, the layer's output, becomes the sum as it goes out.
    __device__ __forceinline__ void add_up(int unit, float (&y)[4]) const {
        float other[4] = {};
        if constexpr (RESIDUAL || POSITION) {
            ahead[unit % kAhead].get(other);
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if constexpr (RESIDUAL || POSITION) {
                y[e] = __fadd_rn(other[e], y[e]);
            }
            if constexpr (HALVED) {
                y[e] *= 0.5f;
            }
        }
        if (is_there(unit % 2)) {
            store_values(to[unit % 2] + unit / 2 * 16, y);
        }
        round_to_stream(y);
    }
};

__device__ __forceinline__ void load_quad(const float* from, float (&to)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}

// The columns' constants, in shared memory: registers for their addresses are few.
enum { kScale = 0, kBias = kBN, kOfOutput = 2 * kBN };

__device__ __forceinline__ void load_output_constants(const GemmArgs& p, float* to) {
    for (int c = threadIdx.x; c < kBN; c += kThreads) {
        to[kScale + c] = W_HALF ? 0.5f * p.scale[c] : p.scale[c];  // half a sum, times the scale, is the same number
        to[kBias + c] = p.bias[c];
    }
}

// A pair of units becomes the layer's output, where its sums are: y's bits.
__device__ __forceinline__ void to_output(const GemmArgs& p, int pair, int lane, const float* constants,
                                          int (&sums)[kRows][kColumns][4]) {
    float scale[4], bias[4], gamma[4];
    load_quad(constants + kScale + 16 * pair, scale);
    load_quad(constants + kBias + 16 * pair, bias);
    if constexpr (GAMMA) {
        load_quad(p.gamma + 4 * (lane % 4) + 16 * pair, gamma);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int& own = sums[0][2 * pair + e / 2][2 * half + e % 2];
            const float y = __fadd_rn(__fmul_rn(__int2float_rn(own), scale[e]), bias[e]);
            own = __float_as_int(GAMMA ? __fmul_rn(y, gamma[e]) : y);
        }
    }
}

// Adds up a tile: `take(unit, y)` is given the sums of unit after unit. `constants`: those of this lane's first column.
template <class Take>
__device__ __forceinline__ void add_up_tile(const GemmArgs& p, Part& part, int lane, const float* constants,
                                            int (&sums)[kRows][kColumns][4], const Take& take) {
#pragma unroll
    for (int first = 0; first < kUnitsOfTile; first += kAhead) {
        if (first > 0) {
            part.fetch(first);
        }
        // While that is on its way:
#pragma unroll
        for (int unit = first; unit < first + kAhead && unit < kUnitsOfTile; unit += 2) {
            to_output(p, unit / 2, lane, constants, sums);
        }
#pragma unroll
        for (int unit = first; unit < first + kAhead && unit < kUnitsOfTile; unit++) {
            float y[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                y[e] = __int_as_float(sums[0][unit / 2 * 2 + e / 2][2 * (unit % 2) + e % 2]);
            }
            part.add_up(unit, y);
            take(unit, y);
        }
    }
}
