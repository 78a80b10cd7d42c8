// The average of a row's tokens, float32 nearest to the real value; a thread a channel.
#include "rounding.cuh"
#include "stream.cuh"

struct PoolArgs {
    const Source* x;  // [B, tokens, C]
    float* out;       // [B, C]
    int tokens, first, channels;
};

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void kernel(const PoolArgs p) {
    await_former_kernel();
    for (int c = blockIdx.y * blockDim.x + threadIdx.x; c < p.channels; c += gridDim.y * blockDim.x) {
        const Source* x = p.x + static_cast<size_t>(blockIdx.x) * p.tokens * p.channels + c;
        double sum = 0.0;
        for (int t = p.first; t < p.tokens; t++) {
            sum += static_cast<double>(value_of(x[static_cast<size_t>(t) * p.channels]));
        }
        p.out[static_cast<size_t>(blockIdx.x) * p.channels + c] = __double2float_rn(sum / (p.tokens - p.first));
    }
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const PoolArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
