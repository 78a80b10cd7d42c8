// The portable kernel: any widths, any processor. The compiler vectorises the loop over the channels of a group of 4 k.
#include <cstring>

#include "kernels.h"
#include "packed_codes.h"

namespace qvit::cpu {
namespace {

size_t row_bytes(int K) { return round_up(static_cast<size_t>(K), 64); }

PackedWeight pack(const int8_t* codes, int M, int K, int bits) { return pack_panels(quad_order, codes, M, K, bits); }

size_t scratch_bytes(int K) { return 64 + expanded_bytes(quad_order.fields(quad_order.panel, K), 3); }

const uint8_t* unpack(const PackedWeight& weight, int p, uint8_t* scratch) {
    const uint8_t* panel = weight.data.get() + weight.panel_bytes * static_cast<size_t>(p);
    if (weight.bits == 8) return panel;
    const size_t count = quad_order.fields(panel_width(weight.M, weight.panel, 16, p * weight.panel), weight.K);
    std::memcpy(scratch, panel, 64);
    expand_stream(panel + 64, count, weight.bits, scratch + 64);
    for (size_t i = 0; i < count; ++i) scratch[64 + i] = static_cast<uint8_t>(scratch[64 + i] - (1 << (weight.bits - 1)));
    return scratch;
}

void sums(const uint8_t* a, ptrdiff_t lda, int rows, const uint8_t* panel, int K, int32_t* out, ptrdiff_t ld_out) {
    int32_t width;
    std::memcpy(&width, panel, sizeof width);
    for (int row = 0; row < rows; ++row, a += lda, out += ld_out) {
        const int8_t* w = reinterpret_cast<const int8_t*>(panel + 64);
        int32_t total[64] = {};
        for (int k = 0; k < K; k += 4, w += 4 * width) {
            int32_t code[4];
            for (int i = 0; i < 4; ++i) code[i] = k + i < K ? a[k + i] : 0;
            for (int channel = 0; channel < width; ++channel)
                total[channel] += code[0] * w[4 * channel] + code[1] * w[4 * channel + 1] + code[2] * w[4 * channel + 2] +
                                  code[3] * w[4 * channel + 3];
        }
        std::memcpy(out, total, static_cast<size_t>(width) * sizeof(int32_t));
    }
}

}  // namespace

const GemmKernel generic_kernel = {"generic", Isa::generic, 64, 1, row_bytes, nullptr, pack, scratch_bytes, unpack, sums};

}  // namespace qvit::cpu
