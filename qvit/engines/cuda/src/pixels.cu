// Images to codes of patches [B * patches, C * height * width], the input of the patch embedding; a block a patch.
#include "layout.cuh"
#include "rounding.cuh"

struct PixelArgs {
    const void* images;    // uint8 or float32 [B, C, H, W]
    const uint8_t* codes;  // of uint8 pixels: [C, 256]
    const float* std;      // of floats: [C], and offsets [C]
    const float* offset;
    uint8_t* out;          // [B * patches, C * height * width], ldo tiles a row
    int* strange;          // set to 1 where a float is not finite
    int channels, height, width, patch_height, patch_width, columns, patches, ldo;
    float step, high;
};

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void kernel(const PixelArgs p) {
    await_former_kernel();
    const int image = blockIdx.x / p.patches, patch = blockIdx.x % p.patches;
    const int row0 = patch / p.columns * p.patch_height, column0 = patch % p.columns * p.patch_width;
    const int area = p.patch_height * p.patch_width;
    for (int i = threadIdx.x; i < p.channels * area; i += blockDim.x) {
        const int channel = i / area, row = row0 + i % area / p.patch_width, column = column0 + i % p.patch_width;
        const size_t at = (static_cast<size_t>(image * p.channels + channel) * p.height + row) * p.width + column;
#if FLOATS
        const float x = static_cast<const float*>(p.images)[at];
        if (!(fabsf(x) < INFINITY)) {
            atomicExch(p.strange, 1);
        }
        p.out[code_at(blockIdx.x, i, p.ldo)] = static_cast<uint8_t>(exact_code(__fmul_rn(x, p.std[channel]), p.offset[channel], p.step, 0.0f, p.high));
#else
        p.out[code_at(blockIdx.x, i, p.ldo)] = p.codes[256 * channel + static_cast<const uint8_t*>(p.images)[at]];
#endif
    }
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const PixelArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
