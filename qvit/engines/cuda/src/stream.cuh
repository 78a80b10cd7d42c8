// Values of the residual stream in memory: float32, or float16, to which sums are rounded (nearest even). Arithmetic is float32.
//
// X_HALF: what a kernel reads of it is float16; OUT_HALF: what it adds to and writes.
#pragma once

#ifndef X_HALF
#define X_HALF 0
#endif
#ifndef OUT_HALF
#define OUT_HALF 0
#endif

// A float16 as it lies in memory.
struct Half {
    uint16_t bits;
};

template <bool kHalf>
struct StreamOf {
    using type = float;
};
template <>
struct StreamOf<true> {
    using type = Half;
};
using Source = StreamOf<X_HALF>::type;
using Stream = StreamOf<OUT_HALF>::type;

#ifndef QVIT_EMULATION  // else in emulation.h

// The float16 nearest to each, a in the lower bits.
__device__ __forceinline__ uint32_t to_halves(float a, float b) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
    return pair;
}
__device__ __forceinline__ void from_halves(uint32_t pair, float& a, float& b) {
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
        : "=f"(a), "=f"(b)
        : "r"(pair));
}

#endif

__device__ __forceinline__ float value_of(float x) { return x; }
__device__ __forceinline__ float value_of(Half x) {
    float a, b;
    from_halves(x.bits, a, b);
    return a;
}
__device__ __forceinline__ void store_value(float* to, float x) { *to = x; }
__device__ __forceinline__ void store_value(Half* to, float x) { to->bits = static_cast<uint16_t>(to_halves(x, 0.0f)); }

// Two or four neighbours, at a multiple of their size.
__device__ __forceinline__ void load_values(const float* from, float (&to)[2]) {
    const float2 pair = *reinterpret_cast<const float2*>(from);
    to[0] = pair.x, to[1] = pair.y;
}
__device__ __forceinline__ void load_values(const float* from, float (&to)[4]) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
}
__device__ __forceinline__ void load_values(const Half* from, float (&to)[2]) {
    from_halves(*reinterpret_cast<const uint32_t*>(from), to[0], to[1]);
}
__device__ __forceinline__ void load_values(const Half* from, float (&to)[4]) {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    from_halves(four.x, to[0], to[1]);
    from_halves(four.y, to[2], to[3]);
}
__device__ __forceinline__ void store_values(float* to, const float (&from)[2]) {
    *reinterpret_cast<float2*>(to) = {from[0], from[1]};
}
__device__ __forceinline__ void store_values(float* to, const float (&from)[4]) {
    *reinterpret_cast<float4*>(to) = {from[0], from[1], from[2], from[3]};
}
__device__ __forceinline__ void store_values(Half* to, const float (&from)[2]) {
    *reinterpret_cast<uint32_t*>(to) = to_halves(from[0], from[1]);
}
__device__ __forceinline__ void store_values(Half* to, const float (&from)[4]) {
    *reinterpret_cast<uint2*>(to) = {to_halves(from[0], from[1]), to_halves(from[2], from[3])};
}

// What is read again of values once they have been stored.
template <int kCount>
__device__ __forceinline__ void round_to_stream(float (&x)[kCount]) {
    static_assert(kCount % 2 == 0, "pairs");
    if constexpr (OUT_HALF) {
#pragma unroll
        for (int i = 0; i < kCount; i += 2) {
            from_halves(to_halves(x[i], x[i + 1]), x[i], x[i + 1]);
        }
    }
}
