// The codes of a row's LayerNorm in fixed point.
//
// A value's place in the range of its codes is sat(((x - mean) * rstd) * gain + shift), of which kPlaces binary places are kept in
// the bits of a float: the code, and how far the value is from the next one. Whoever is near to the boundary between two codes is
// in doubt, and computed again as it is defined.
#pragma once

#include "norm_row.cuh"

constexpr int kPlaces = WIDE ? 15 : 16;  // a code and these fit 23 bits

// A lane's values of a row: their codes less the lowest one in the third byte; in doubt where the two below are up to `reach`.
struct RowPlaces {
    uint32_t u[kLanes], reach;
    float mean;
    bool close;  // some value of the lane is in doubt

    __device__ __forceinline__ bool doubts(int i) const { return (u[i] & 0xFFFFu) <= reach || reach >= 32768u; }
};

// `gain(i)`, `shift(i)`: `p`'s, of the lane's value i.
template <class Gain, class Shift>
__device__ __forceinline__ RowPlaces places_of(const NormArgs& p, const float (&x)[kLanes], const Gain& gain, const Shift& shift,
                                            int lane) {
    RowPlaces of;
    float sums[4] = {}, squares[4] = {};  // four of each, so that few roundings are one after the other
#pragma unroll
    for (int i = 0; i < kLanes; i++) {  // zeros behind the last channel
        sums[i % 4] += x[i];
        squares[i % 4] = fmaf(x[i], x[i], squares[i % 4]);
    }
    float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]), square = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    add_both<32>(sum, square);
    of.mean = sum * (1.0f / CHANNELS);
    square *= 1.0f / CHANNELS;
    const float rstd = rsqrtf(fmaxf(fmaf(-of.mean, of.mean, square), 0.0f) + p.eps_float), moved = -of.mean * rstd;
    // Where the mean is large beside the deviation, its square takes digits from the variance.
    const float margin = fmaf(p.slope, square * rstd * rstd, p.margin);
    // In units of the last place: values are made whole numbers of them, as boundaries are, which takes half a unit of the margin.
    const float units = floorf(fminf(margin * (1.001f * (1 << kPlaces)), 1 << (kPlaces - 2)));
    of.reach = 2 * static_cast<uint32_t>(units) << (16 - kPlaces);
    const float most = (p.high - p.low) * (1 << kPlaces), whole = 8388608.0f + (1 << (kPlaces - 1)) + units;
    uint32_t least = 0xFFFFFFFFu;
#pragma unroll
    for (int i = 0; i < kLanes; i++) {
        const float z = fmaf(x[i], rstd, moved);
        const float place = __saturatef(fmaf(z, gain(i), shift(i)));
        of.u[i] = static_cast<uint32_t>(__float_as_int(fmaf(place, most, whole))) << (16 - kPlaces);
        if (CHANNELS % 32 != 0 && channel(i, lane) >= CHANNELS) {
            of.u[i] = 0x8000;
        }
    }
#pragma unroll
    for (int i = 0; i < kLanes; i += 2) {
        least = __vminu2(least, __byte_perm(of.u[i], of.u[i + 1 < kLanes ? i + 1 : i], 0x5410));
    }
    of.close = min(least & 0xFFFFu, least >> 16) <= of.reach || of.reach >= 32768u;
    return of;
}

// The third bytes of four values, from which the range's lowest code is still missing; of two in the lower half.
__device__ __forceinline__ uint32_t third_bytes(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x0062); }
__device__ __forceinline__ uint32_t third_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return __byte_perm(third_bytes(a, b), third_bytes(c, d), 0x5410);
}
// Codes, a byte each, from codes less the lowest one.
__device__ __forceinline__ uint32_t from_lowest(uint32_t codes, int low) {
    const uint32_t first = static_cast<uint32_t>(128 + low) * 0x01010101u;
    return low == 0 ? codes : (codes + first) ^ 0x80808080u;  // no byte carries
}
