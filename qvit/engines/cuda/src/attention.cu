// Attention of one head of one image: scores, softmax, codes of the map, values, codes of proj's input. Nothing of size N x N
// leaves the registers. In Swin a window is an image.
//
//     scores = score_scale * (q k^T [+ 1/2 sum of k's codes]),   p = codes of softmax(scores),   y = value_scale * (p v) + ..
//
// In windows (BIAS) scores become floats, to which the bias of relative positions is added, and -100 where two tokens belong to
// different regions of a shifted map (MASK).
//
// How the work is shared out (`attention_blocks.py` chooses):
//
//     SPLIT    few heads, or few QUERIES of each: a block has 16 queries, each of its warps 32 of the keys
//     RING     many heads, on Hopper: one block a multiprocessor, RING heads in shared memory; a warp has 16 queries of any of them
//     else     a block has one head of p.pack images, one after another, with k and v of two in shared memory
//
// A warp has the exponentials of its keys in registers where they fit (`Once`; LONG = 0), else it computes the scores three times
// (`Thrice`).
#include "attention_once.cuh"
#if SPLIT
#include "attention_split.cuh"
#elif RING
#include "attention_ring.cuh"
#endif

#ifndef QVIT_EMULATION
extern "C"
#endif
__global__ void __launch_bounds__(kThreads, BLOCKS) kernel(const QVIT_CONSTANT AttentionArgs p) {
    QVIT_SHARED(memory);
#if SPLIT
    const unsigned part = blockIdx.x % kQueryTiles, of_all = blockIdx.x / kQueryTiles;
    const int of_image = of_all % p.heads, image_of = of_all / p.heads;
    const Head head = {memory,
                       memory + kBytes,
                       nullptr,
                       reinterpret_cast<int*>(memory + 2 * kBytes),
                       nullptr,
                       nullptr,
                       image_of,
                       of_image,
                       static_cast<size_t>(of_all) * TOKENS,
                       p.score_scale[of_image],
                       p.map_scale[of_image],
                       reinterpret_cast<const float*>(memory + kGainsAt)};
    const Rows rows = {p, head, static_cast<int>(16 * part), static_cast<int>(threadIdx.x % 32)};
    const Split split = {p, memory, rows, static_cast<int>(threadIdx.x / 32), rows.lane};
    split.begin();
    await_former_kernel();
    if (!split.run()) {
        const Head copy = head;  // its address is given away, that of `head` is not
        thrice(p, copy, rows.query0);
    }
#else
    await_former_kernel();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, index = blockIdx.x % p.heads;
    const int first_image = blockIdx.x / p.heads * p.pack, count = min(p.pack, p.images - first_image);
    const float* bias = BIAS ? p.bias + static_cast<size_t>(index) * TOKENS * kBiasLine : nullptr;
    if (kHoldsBias) {
        unsigned char* const held = memory + kStages * kStageBytes;
        for (int i = threadIdx.x; i < TOKENS * kBiasLine / 4; i += kThreads) {
            copy_async(held + 16 * i, bias + 4 * i, true);
        }
        bias = reinterpret_cast<const float*>(held);
    }
    const float scale = p.score_scale[index], step = p.map_scale[index];
    const auto head_of = [&](int n) -> Head {
        unsigned char* const stage = memory + static_cast<unsigned>(n) % kStages * kStageBytes;
        const int image = first_image + n;
        return {stage,
                stage + kBytes,
                stage + 2 * kBytes + 4 * 32 * kGroups,
                reinterpret_cast<int*>(stage + 2 * kBytes),
                bias,
                MASK ? p.regions + image % p.windows * kRegionLine : nullptr,
                image,
                index,
                (static_cast<size_t>(image) * p.heads + index) * TOKENS,
                scale,
                step,
                RING ? reinterpret_cast<const float*>(memory + kGainsAt) : nullptr};
    };

#if RING
    const Ring<decltype(head_of)> ring = {p, head_of, memory, count, lane};
    ring.begin();
    unsigned tile = of_first_lane(lane == 0 ? warp : 0);
#pragma unroll 1
    while (tile < count * kQueryTiles) {
        const int n = tile / kQueryTiles, part = tile % kQueryTiles;
        ring.enter(n, part);
        const Head head = head_of(n);
        const Rows rows = {p, head, 16 * part, lane};
        uint32_t q[kSteps][4];
        rows.load_q(q);
        int next = 0;
        const auto leave = [&] {
            ring.leave(n);
            next = ring.take();
        };
        if (!Once::of(rows).run(q, [] {}, leave)) {
            const Head copy = head;  // its address is given away, that of `head` is not
            thrice(p, copy, rows.query0);
            leave();
        }
        tile = of_first_lane(next);
    }
#else
    // Tiles of 16 queries, of one head after another: WARPS of them a round, which may be the last ones of a head and the first ones
    // of the next. The head behind those is on its way meanwhile; what came in a round is prepared in the next.
    const auto rows_of = [&](int tile, const Head& head) -> Rows { return {p, head, 16 * (tile % kRound), lane}; };
    const auto head_at = [&](int tile) { return head_of(min(tile / kRound, count - 1)); };
    int loaded = 0, prepared = 0;
    uint32_t q[kSteps][4];
    rows_of(WARPS * blockIdx.y + warp, head_at(WARPS * blockIdx.y + warp)).load_q(q);
#pragma unroll 1
    for (int round = WARPS * blockIdx.y; round < count * kRound; round += WARPS * gridDim.y) {
        const int oldest = round / kRound, newest = min((round + WARPS - 1) / kRound, count - 1);
        copies_wait<0>();
        __syncthreads();  // all are done with the round before, and what it loaded and prepared is there
        int seen = prepared;
        if (prepared < loaded) {
            prepare_head(head_of(prepared++));
        }
#pragma unroll 1
        while (loaded < min(count, oldest + kStages)) {
            load_head(p, head_of(loaded++));
        }
#pragma unroll 1
        while (seen <= newest) {
            if (seen == prepared) {
                loaded > prepared + 1 ? copies_wait<1>() : copies_wait<0>();
                __syncthreads();
                prepare_head(head_of(prepared++));
            }
            __syncthreads();
            seen = prepared;
        }
        const int tile = round + warp, next = tile + WARPS * gridDim.y;
        const Head head = head_at(tile), next_head = head_at(next);
        const Rows rows = rows_of(tile, head), next_rows = rows_of(next, next_head);
        if (tile >= count * kRound || rows.query0 >= QUERIES) {
            next_rows.load_q(q);
            continue;
        }
#if !LONG
        if (Once::of(rows).run(q, [&] { next_rows.load_q(q); }, [] {})) {
            continue;
        }
#endif
        const Head copy = head;  // its address is given away, that of `head` is not
        thrice(p, copy, rows.query0);
    }
#endif
#endif
}

#ifdef QVIT_EMULATION
extern "C" void emulate(const void* args, int x, int y, int z, int threads, int bytes) {
    emulation::launch([](const void* a) { kernel(*static_cast<const AttentionArgs*>(a)); }, args, x, y, z, threads, bytes);
}
#endif
