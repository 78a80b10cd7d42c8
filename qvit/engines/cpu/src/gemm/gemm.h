// Integer matrix products of the CPU engine: exact int32 sums of unsigned activation codes times signed weight codes,
//
//     sums[row][channel] = sum over k of a[row][k] * w[channel][k],   0 <= a < 2^act_bits,  -2^(bits-1) <= w < 2^(bits-1)
//
// Kernels hold no state: threads may split panels, rows or both. Use:
//
//     const GemmKernel& kernel = choose_kernel(weight_bits, act_bits, isa);
//     PackedWeight weight = kernel.pack(codes, M, K, weight_bits);     // at load time; stays packed in memory
//     kernel.prepare(a, lda, rows, K, prepared, pitch);                // once a layer, or a row as soon as it is there
//     for each panel p:
//         const uint8_t* panel = kernel.unpack(weight, p, scratch);    // scratch of kernel.scratch_bytes(K)
//         for each tile of rows:
//             kernel.sums(prepared + row * pitch, pitch, count, panel, K, out, ld_out);
//             the epilogue, `out` still in the first-level cache
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace qvit::cpu {

enum class Isa { generic, avx2, avx512vnni, neon };

// Frees what aligned_bytes allocated.
struct AlignedDelete {
    void operator()(uint8_t* bytes) const;
};
using AlignedBytes = std::unique_ptr<uint8_t[], AlignedDelete>;

// `size` zeroed bytes, 64-byte aligned. Throws std::bad_alloc.
AlignedBytes aligned_bytes(size_t size);

// A weight [M, K] in the order in which its kernel reads it, `bits` bits a code.
struct PackedWeight {
    int M = 0, K = 0, bits = 0;
    int panel = 0;           // output channels a panel; panel p holds channels [p * panel, min(M, (p + 1) * panel))
    size_t panel_bytes = 0;  // distance of two panels
    size_t bytes = 0;        // all panels
    AlignedBytes data;

    int panels() const { return (M + panel - 1) / panel; }
};

// Starts to bring part `part` of the `parts` equal parts of packed panel p (if there is one) into the second-level cache.
// Called for the next panel between the row tiles of this one, it hides the memory: a model's weights do not stay in the
// caches.
static inline void prefetch_panel(const PackedWeight& weight, int p, int part, int parts) {
    const size_t start = weight.panel_bytes * static_cast<size_t>(p);
    if (start >= weight.bytes) return;
    const size_t size = weight.bytes - start < weight.panel_bytes ? weight.bytes - start : weight.panel_bytes;
    const size_t lines = (size + 63) / 64, from = lines * static_cast<size_t>(part) / static_cast<size_t>(parts);
    for (size_t i = from; i < lines * static_cast<size_t>(part + 1) / static_cast<size_t>(parts); ++i)
        __builtin_prefetch(weight.data.get() + start + 64 * i, 0, 2);
}

struct GemmKernel {
    const char* name;
    Isa isa;
    int panel;     // output channels a panel, a multiple of 16
    int row_step;  // rows are fastest in multiples of this

    // Bytes of one prepared row, a multiple of 64.
    size_t (*row_bytes)(int K);

    // Brings activation codes, uint8 [rows][lda], lda >= K, nothing read behind the K codes of a row, into the form that sums
    // reads: out [rows][pitch], pitch >= row_bytes(K) and a multiple of 64, out 64-byte aligned. Rows are independent. Null
    // where sums reads plain codes: the caller then may pass sums its own rows, if row_bytes(K) bytes of each can be read (what
    // lies behind the K codes may hold anything).
    void (*prepare)(const uint8_t* a, ptrdiff_t lda, int rows, int K, uint8_t* out, ptrdiff_t pitch);

    // codes: int8 [M][K], each in [-2^(bits-1), 2^(bits-1)).
    PackedWeight (*pack)(const int8_t* codes, int M, int K, int bits);

    // Expands panel p into `scratch` (64-byte aligned; untouched where the kernel reads packed weights) and returns what sums
    // reads, valid as long as scratch and weight are.
    size_t (*scratch_bytes)(int K);
    const uint8_t* (*unpack)(const PackedWeight& weight, int p, uint8_t* scratch);

    // Exact sums of `rows` prepared rows times one panel: out int32 [rows][ld_out], ld_out >= panel, in channel order. All
    // channels of the panel are written; of those behind M, any or none, with any value. Fastest if out is 64-byte aligned.
    void (*sums)(const uint8_t* prepared, ptrdiff_t pitch, int rows, const uint8_t* panel, int K, int32_t* out,
                 ptrdiff_t ld_out);
};

// Whether this build and this processor have a path, and the best that they have.
bool isa_supported(Isa isa);
Isa best_isa();

// The fastest kernel of `isa` for weights of weight_bits (2 to 4 or 8) and activations of act_bits (1 to 8) bits.
// Throws std::invalid_argument where the build or the processor lacks `isa`, or for other widths.
const GemmKernel& choose_kernel(int weight_bits, int act_bits, Isa isa);

// Kernel number `index` of those that run here and are exact at these widths, or null behind the last: for tests and
// benchmarks.
const GemmKernel* kernel_at(int index, int weight_bits, int act_bits);

}  // namespace qvit::cpu
