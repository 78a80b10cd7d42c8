// Images to codes of patches [B * patches, CHANNELS * PATCH_HEIGHT * PATCH_WIDTH], the input of the patch embedding.
//
// A warp makes a chunk of four patches' codes, 16 a lane. Pixels of a patch's row come UNIT at a time: so many lie next to each
// other in the image and in the codes, wherever a lane begins.
#include "layout.cuh"
#include "rounding.cuh"

struct PixelArgs {
    const void* images;    // uint8 or float32 [B, CHANNELS, HEIGHT, WIDTH]
    const uint8_t* codes;  // of uint8 pixels: [CHANNELS, 256]; the pixels are the codes where IDENTITY
    const float* std;      // of floats: [CHANNELS], and offsets [CHANNELS]
    const float* offset;
    uint8_t* out;
    int* strange;  // set to 1 where a float is not finite
    int rows;      // B * patches
    float step, high;
};

constexpr int kArea = PATCH_HEIGHT * PATCH_WIDTH, kFeatures = CHANNELS * kArea, kChunks = (kFeatures + kChunk - 1) / kChunk;
constexpr int kAcross = WIDTH / PATCH_WIDTH, kPatches = HEIGHT / PATCH_HEIGHT * kAcross;

union Piece {
    uint8_t codes[16];
    uint4 whole;
};

// UNIT pixels from `at` on, of one channel.
__device__ __forceinline__ void convert(const PixelArgs& p, size_t at, int channel, uint8_t* codes) {
#if FLOATS
#pragma unroll
    for (int i = 0; i < UNIT; i++) {
        const float x = static_cast<const float*>(p.images)[at + i];
        if (!(fabsf(x) < INFINITY)) {
            atomicExch(p.strange, 1);
        }
        codes[i] = static_cast<uint8_t>(exact_code(__fmul_rn(x, p.std[channel]), p.offset[channel], p.step, 0.0f, p.high));
    }
#else
    const uint8_t* from = static_cast<const uint8_t*>(p.images) + at;
    Piece pixels;
#if UNIT == 16
    pixels.whole = *reinterpret_cast<const uint4*>(from);
#elif UNIT == 8
    *reinterpret_cast<uint2*>(pixels.codes) = *reinterpret_cast<const uint2*>(from);
#elif UNIT == 4
    *reinterpret_cast<uint32_t*>(pixels.codes) = *reinterpret_cast<const uint32_t*>(from);
#elif UNIT == 2
    *reinterpret_cast<uint16_t*>(pixels.codes) = *reinterpret_cast<const uint16_t*>(from);
#else
    pixels.codes[0] = *from;
#endif
#pragma unroll
    for (int i = 0; i < UNIT; i++) {
        codes[i] = IDENTITY ? pixels.codes[i] : p.codes[256 * channel + pixels.codes[i]];
    }
#endif
}

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void kernel(const PixelArgs p) {
    await_former_kernel();
    const int lane = threadIdx.x % 32, warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    const int chunk = warp % kChunks, row = warp / kChunks * 4 + lane / 8;
    const int first = chunk * kChunk + lane % 8 * 16;
    if (row >= p.rows || first >= kFeatures) {
        return;
    }
    const int image = row / kPatches, patch = row % kPatches;
    const int top = patch / kAcross * PATCH_HEIGHT, left = patch % kAcross * PATCH_WIDTH;
    Piece piece = {};
#pragma unroll
    for (int i = 0; i < 16; i += UNIT) {
        const int feature = first + i, channel = feature / kArea, y = feature % kArea / PATCH_WIDTH, x = feature % PATCH_WIDTH;
        if (feature < kFeatures) {
            convert(p, (static_cast<size_t>(image * CHANNELS + channel) * HEIGHT + top + y) * WIDTH + left + x, channel,
                    piece.codes + i);
        }
    }
    *reinterpret_cast<uint4*>(p.out + code_at(row, first, kChunks)) = piece.whole;
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const PixelArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
