// The second product of attention, codes of the map with values, and the codes of proj's input that follow.
#pragma once

#include "attention_rows.cuh"

struct Values {
    // Of pieces of 16 channels: sums of even ones, then of odd ones; lane t of a quad has 4t, 4t + 2 and 4t + 1, 4t + 3.
    int sums[kColumns][2][4];
    int row_sums[4];  // the same with ones for values

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sums[j][i / 4][i % 4] = 0;
            }
        }
        row_sums[0] = row_sums[1] = row_sums[2] = row_sums[3] = 0;
    }

    // The step over 32 keys.
    __device__ __forceinline__ void add(const MapWords& first, const MapWords& second, const Rows& rows, int group) {
        const uint32_t a[4] = {first.row, first.row8, second.row, second.row8};
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
            const uint4 b = *reinterpret_cast<const uint4*>(rows.head.values + (group * kColumns + j) * 512 + 16 * rows.lane);
            const uint32_t even[2] = {b.x, b.y}, odd[2] = {b.z, b.w};
            if constexpr (V_SIGNED) {
                multiply<false>(sums[j][0], a, even);
                multiply<false>(sums[j][1], a, odd);
            } else {
                multiply_unsigned(sums[j][0], a, even);
                multiply_unsigned(sums[j][1], a, odd);
            }
        }
        if (V_OFFSET != 0) {
            const uint32_t ones[2] = {0x01010101u, 0x01010101u};
            multiply_unsigned(row_sums, a, ones);
        }
    }

    // y of one output channel, in the reference engine's roundings.
    __device__ __forceinline__ static float value_of(int sum, int row_sum, float scale, float row_scale) {
        if (V_OFFSET == 1) {
            return __fmul_rn(0.5f * __int2float_rn(2 * sum + row_sum), scale);
        }
        const float y = __fmul_rn(__int2float_rn(sum), scale);
        return V_OFFSET == 2 ? __fadd_rn(y, __fmul_rn(__int2float_rn(row_sum), row_scale)) : y;
    }

    // Codes of four channels 16 j + 4 t .. of a row, and the fractions that tell whether they are in doubt, as halves of a word.
    struct Codes {
        uint32_t word, fractions;
    };

    // A value's place in the codes' range, 0 .. 1, becomes a fixed-point number of FIXED binary places, the bits of a float: half a
    // code and `near` / 2 are added, so that its whole part is the code, and its fraction is below `near` where that is in doubt.
    __device__ __forceinline__ static Codes codes_of(const Rows& rows, int j, int s0, int s1, int s2, int s3, float row_sum) {
        const AttentionArgs& p = rows.p;
        const int of_head = 16 * j + 4 * (rows.lane % 4), c = rows.head.index * HEAD_DIM + of_head;
        const float* const gains = rows.head.gains;
        const Four4 gain = kHoldsGains ? four(gains, of_head) : four(p.gain, c);
        const Four4 shift = kHoldsGains ? four(gains + HEAD_DIM, of_head) : four(p.shift, c);
        const Four4 row_gain = !V_OFFSET ? shift : kHoldsGains ? four(gains + 2 * HEAD_DIM, of_head) : four(p.row_gain, c);
        uint32_t fixed[4];
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int sum = e == 0 ? s0 : e == 1 ? s1 : e == 2 ? s2 : s3;
            const float rest = V_OFFSET ? fmaf(row_sum, row_gain.x[e], shift.x[e]) : shift.x[e];
            const float place = __saturatef(fmaf(__int2float_rn(sum), gain.x[e], rest));
            fixed[e] = static_cast<uint32_t>(__float_as_int(fmaf(place, p.fixed_step, p.fixed_first))) << (16 - FIXED);
        }
        const uint32_t low = __byte_perm(fixed[0], fixed[1], 0x0062), high = __byte_perm(fixed[2], fixed[3], 0x0062);
        return {from_low(__byte_perm(low, high, 0x5410)),
                __vminu2(__byte_perm(fixed[0], fixed[1], 0x5410), __byte_perm(fixed[2], fixed[3], 0x5410))};
    }

    // Codes of the values of both rows, written.
    __device__ __forceinline__ void finish(const Rows& rows) const {
        const AttentionArgs& p = rows.p;
        const float row_sum[2] = {__int2float_rn(row_sums[0]), __int2float_rn(row_sums[2])};
        uint32_t words[2][kColumns], fractions[2][kColumns], least = kAll;
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const Codes found =
                    codes_of(rows, j, sum(j, half, 0), sum(j, half, 1), sum(j, half, 2), sum(j, half, 3), row_sum[half]);
                words[half][j] = found.word;
                fractions[half][j] = found.fractions;
                least = __vminu2(least, found.fractions);
            }
        }
        if (doubtful(p, least)) {
#pragma unroll
            for (int i = 0; i < 2 * kColumns; i++) {
                const int half = i / kColumns, j = i % kColumns;
                if (doubtful(p, fractions[half][j])) {
                    const int c = rows.head.index * HEAD_DIM + 16 * j + 4 * (rows.lane % 4);
                    words[half][j] = again(p, c, row_sums[2 * half], sum(j, half, 0), sum(j, half, 1), sum(j, half, 2), sum(j, half, 3));
                }
            }
        }
        write<0, kColumns>(rows, 0, words[0]);
        write<0, kColumns>(rows, 1, words[1]);
    }

    // Codes of kCount pieces of 16 channels from kFirst on, of one row, written.
    template <int kFirst, int kCount>
    __device__ __forceinline__ static void finish_row(const Rows& rows, int half, const int (&s)[kCount][4], int row_sum) {
        uint32_t words[kCount], fractions[kCount], least = kAll;
#pragma unroll
        for (int i = 0; i < kCount; i++) {
            const Codes found = codes_of(rows, kFirst + i, s[i][0], s[i][1], s[i][2], s[i][3], __int2float_rn(row_sum));
            words[i] = found.word;
            fractions[i] = found.fractions;
            least = __vminu2(least, found.fractions);
        }
        if (doubtful(rows.p, least)) {
#pragma unroll
            for (int i = 0; i < kCount; i++) {
                if (doubtful(rows.p, fractions[i])) {
                    const int c = rows.head.index * HEAD_DIM + 16 * (kFirst + i) + 4 * (rows.lane % 4);
                    words[i] = again(rows.p, c, row_sum, s[i][0], s[i][1], s[i][2], s[i][3]);
                }
            }
        }
        write<kFirst, kCount>(rows, half, words);
    }

    // Of channel 16 j + 4 t + e of a row.
    __device__ __forceinline__ int sum(int j, int half, int e) const { return sums[j][e % 2][2 * half + e / 2]; }

    // The four sums of a piece and a row for another warp, in two stores, as two and two of them are neighbours in registers.
    __device__ __forceinline__ void give(int4* to, int j, int half) const {
        uint2* const words = reinterpret_cast<uint2*>(to);
#pragma unroll
        for (int odd = 0; odd < 2; odd++) {
            const int(&from)[4] = sums[j][odd];
            words[odd] = {static_cast<uint32_t>(from[2 * half]), static_cast<uint32_t>(from[2 * half + 1])};
        }
    }
    // Adds such sums, in the channels' order.
    __device__ __forceinline__ static void add_given(int (&s)[4], const int4& given) {
        s[0] += given.x;
        s[1] += given.z;
        s[2] += given.y;
        s[3] += given.w;
    }

    struct Four4 {
        float x[4];
    };
    __device__ __forceinline__ static Four4 four(const float* from, int c) {
        const float4 found = *reinterpret_cast<const float4*>(from + c);
        return {{found.x, found.y, found.z, found.w}};
    }

    // Whether one of the fractions in both halves is next to a boundary.
    __device__ __forceinline__ static bool doubtful(const AttentionArgs& p, uint32_t fractions) {
        return static_cast<int>(min(fractions & 0xFFFFu, fractions >> 16)) < p.near;
    }

    // Four codes, counted from the lowest one, as they are.
    __device__ __forceinline__ static uint32_t from_low(uint32_t codes) {
        constexpr uint32_t kLow = 0x01010101u * (OUT_LOW & 0xFF);
        return OUT_LOW == 0 ? codes : ((codes & 0x7F7F7F7Fu) + (kLow & 0x7F7F7F7Fu)) ^ ((codes ^ kLow) & 0x80808080u);
    }

    // Four codes as they are defined.
    __device__ __noinline__ static uint32_t again(const AttentionArgs& p, int c, int row_sum, int s0, int s1, int s2, int s3) {
        uint32_t word = 0;
#pragma unroll 1
        for (int e = 0; e < 4; e++) {
            const int s = e == 0 ? s0 : e == 1 ? s1 : e == 2 ? s2 : s3;
            const float y = value_of(s, row_sum, p.value_scale[c + e], V_OFFSET == 2 ? p.value_row[c + e] : 0.0f);
            word |= (static_cast<uint32_t>(exact_code(y, p.offset[c + e], p.step[c + e], p.low, p.high)) & 0xFFu) << (8 * e);
        }
        return word;
    }

    // A row's line in the tiles of a column, and where in it that column is. What is behind the last query is computed of its codes,
    // and written where it is.
    struct Line {
        uint8_t* at;
        unsigned column;
    };
    __device__ __forceinline__ static Line line_of(const Rows& rows, int half, int column) {
        const unsigned row = rows.head.image * QUERIES + min(rows.query(half), QUERIES - 1);
        return {rows.p.out + static_cast<size_t>(row / kTileRows) * static_cast<unsigned>(rows.p.ldo * kTileBytes) +
                    (column / kChunk * kTileBytes + row % kTileRows * kChunk),
                (column ^ row % 8 * 16) % kChunk};
    }

#if OUT_BITS
    // A row's codes of pieces kFirst .. of 16 channels as words of bits, of which lane t of a quad writes that of 32 channels t / 2 and
    // plane t % 2. Each lane has eight bits of every word: as a byte's halves, as they are of different pieces.
    template <int kFirst, int kCount>
    __device__ __forceinline__ static void write(const Rows& rows, int half, const uint32_t (&words)[kCount]) {
        const int t = rows.lane % 4;
        const uint32_t even_odd = t % 2 ? 0x3715 : 0x6240, low_high = t / 2 ? 0x3276 : 0x5410;
        uint32_t high[4] = {0u, 0u, 0u, 0u};  // in the highest byte; see `plane_of_pairs`
#pragma unroll
        for (int w = 0; w < kCount / 2; w++) {
            const uint32_t pairs = words[2 * w] | words[2 * w + 1] << 4;
            high[kFirst + 2 * w] = (pairs & 0x11111111u) * 0x01020408u;
            high[kFirst + 2 * w + 1] = (pairs >> 1 & 0x11111111u) * 0x01020408u;
        }
        uint32_t x = __byte_perm(__byte_perm(high[0], high[1], 0x73), __byte_perm(high[2], high[3], 0x73), 0x5410);
        x = __byte_perm(x, __shfl_xor_sync(kAll, x, 1), even_odd);
        x = __byte_perm(x, __shfl_xor_sync(kAll, x, 2), low_high);  // byte i is lane i's
        const uint32_t low = x & 0x0F0F0F0Fu, rest = x >> 4 & 0x0F0F0F0Fu;
        if (t >= kFirst && t < kFirst + kCount) {
            const Line line = line_of(rows, half, bit_at(rows.head.index * HEAD_DIM + 32 * (t / 2), t % 2));
            *reinterpret_cast<uint32_t*>(line.at + line.column) = __byte_perm(low | low >> 4, rest | rest >> 4, 0x6420);
        }
    }
#else
    // A row's codes of pieces kFirst .. of 16 channels.
    template <int kFirst, int kCount>
    __device__ __forceinline__ static void write(const Rows& rows, int half, const uint32_t (&words)[kCount]) {
        const Line line = line_of(rows, half, rows.head.index * HEAD_DIM + 4 * (rows.lane % 4));
#pragma unroll
        for (int j = 0; j < kCount; j++) {  // 16 channels on is another piece of the same 128 bytes
            *reinterpret_cast<uint32_t*>(line.at + (line.column ^ 16 * (kFirst + j))) = words[j];
        }
    }
#endif
};
