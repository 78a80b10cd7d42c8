// Attention of one head of one image: scores, softmax, codes of the map, values, codes of proj's input. Nothing of size N x N
// leaves the registers. In Swin a window is an image; a block then has one head of PACK windows, one after another.
//
//     scores = score_scale * (q k^T [+ 1/2 sum of k's codes]),   p = codes of softmax(scores),   y = value_scale * (p v) + ..
//
// In windows (BIAS) scores become floats, to which the bias of relative positions is added, and -100 where two tokens belong to
// different regions of a shifted map (MASK).
//
// A block holds k and v of its head in shared memory; each warp takes 16 queries at a time, with the exponentials of all keys in
// its registers where they fit (`Once`; LONG = 0), else computing the scores three times (`Thrice`).
#include "attention_once.cuh"

// What `Once` could not decide, out of its way: its own registers, and not in the instructions that all warps go through.
#ifndef QVIT_EMULATION
__noinline__
#endif
    __device__ void thrice(const AttentionArgs& p, const Head& head, int query0) {
    const Rows rows = {p, head, query0, static_cast<int>(threadIdx.x % 32)};
    Thrice{rows}.run();
}

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads, BLOCKS) kernel(const __grid_constant__ AttentionArgs p) {
    QVIT_SHARED(memory);
    Head head;
    head.keys = memory;
    head.values = memory + kKeyBytes;
    head.queries = memory + kKeyBytes + kValueBytes;
    head.key_sums = reinterpret_cast<int*>(head.queries + kQueryBytes);
    head.index = blockIdx.x % p.heads;
    head.scale = p.score_scale[head.index];
    head.step = p.map_scale[head.index];
    head.bias = BIAS ? p.bias + static_cast<size_t>(head.index) * TOKENS * kBiasLine : nullptr;
    if (kHoldsBias) {
        unsigned char* held = reinterpret_cast<unsigned char*>(head.key_sums + 32 * kGroups);
        for (int i = threadIdx.x; i < TOKENS * kBiasLine / 4; i += kThreads) {
            copy_async(held + 16 * i, head.bias + 4 * i, true);
        }
        head.bias = reinterpret_cast<const float*>(held);
    }
    const int first_image = blockIdx.x / p.heads * PACK;
#pragma unroll 1
    for (head.image = first_image; head.image < first_image + PACK; head.image++) {
        if (PACK > 1) {
            if (head.image == p.images) {
                break;
            }
            __syncthreads();  // all are done with the keys and values before
        }
        head.first = (static_cast<size_t>(head.image) * p.heads + head.index) * TOKENS;
        head.regions = MASK ? p.regions + head.image % p.windows * kRegionLine : nullptr;
        load_head(p, head);
#pragma unroll 1
        for (int tile = blockIdx.y * WARPS + threadIdx.x / 32; tile < kQueryTiles; tile += WARPS * gridDim.y) {
#if !LONG
            const Rows rows = {p, head, 16 * tile, static_cast<int>(threadIdx.x % 32)};
            if (Once::of(rows).run()) {
                continue;
            }
#endif
            const Head copy = head;  // its address is given away, that of `head` is not
            thrice(p, copy, 16 * tile);
        }
    }
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const AttentionArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
