#include "model.h"

#include <cstring>
#include <stdexcept>
#include <utility>

#if defined(QVIT_X86)
#include <cpuid.h>
#endif

namespace qvit::cpu {

namespace {

// Codes of `bits` bits of a little-endian stream, sign-extended.
std::vector<int8_t> unpack_stream(const uint8_t* packed, size_t count, int bits) {
    std::vector<int8_t> codes(count);
    if (bits == 2 || bits == 4 || bits == 8) {  // whole codes a byte: all codes of a byte from a table
        const int each = 8 / bits;
        int8_t table[256][4];
        for (int byte = 0; byte < 256; byte++) {
            for (int i = 0; i < each; i++) {
                const int code = byte >> (bits * i) & ((1 << bits) - 1);
                table[byte][i] = static_cast<int8_t>(code >= 1 << (bits - 1) ? code - (1 << bits) : code);
            }
        }
        size_t i = 0;
        for (; i + static_cast<size_t>(each) <= count; i += static_cast<size_t>(each)) {
            std::memcpy(codes.data() + i, table[*packed++], static_cast<size_t>(each));
        }
        for (int part = 0; i < count; i++, part++) {
            codes[i] = table[*packed][part];
        }
        return codes;
    }
    const unsigned mask = (1u << bits) - 1, sign = 1u << (bits - 1);
    unsigned held = 0;
    int have = 0;
    for (size_t i = 0; i < count; i++) {
        if (have < bits) {
            held |= static_cast<unsigned>(*packed++) << have;
            have += 8;
        }
        const unsigned code = held & mask;
        codes[i] = static_cast<int8_t>(static_cast<int>(code ^ sign) - static_cast<int>(sign));
        held >>= bits;
        have -= bits;
    }
    return codes;
}

}  // namespace

Quantize InputCodes::view() const {
    return {static_cast<int>(scale.size()), inverse.data(),   scale.data(),
            offset.data(),                  row_inverse.data(), row_scale.data(),
            static_cast<float>(low),        static_cast<float>(high)};
}

HeadCodes HeadConstants::view() const {
    HeadCodes view = codes;
    view.gain = gain.data();
    view.shift = shift.data();
    view.weight = weight.data();
    view.bias = bias.data();
    view.offset = offset.data();
    view.scale = scale.data();
    view.row_inverse = row_inverse.data();
    view.row_scale = row_scale.data();
    return view;
}

void build_thresholds(const OpTable& ops, Activation activation, Block& block) {
    const Linear& fc1 = block.fc1;
    const InputCodes& input = block.fc2.input;
    const int count = input.high - input.low;
    // Whole numbers that differ by token only by a row sum: a token's own scale would move its thresholds.
    if ((count != 3 && count != 7 && count != 15) || fc1.groups() > 1 || !fc1.input.row_scale.empty() || !input.row_scale.empty()) {
        return;
    }
    const int64_t range = static_cast<int64_t>(fc1.K) * (fc1.input.high - fc1.input.low) * ((1 << (fc1.bits - 1)) + 1) * 4;
    if (range >= 1 << 29) {
        return;
    }
    const size_t groups = (static_cast<size_t>(fc1.M) + kPad - 1) / kPad;
    Ints values(groups * static_cast<size_t>(count + kMostBelow) * kPad);
    const int below = ops.find_thresholds(fc1.sums(0, nullptr), activation, input.view(), 4 * block.gelu_margin, fc1.M,
                                          static_cast<int32_t>(range), count, values.data());
    if (below >= 0) {
        block.gelu_thresholds = std::move(values);
        block.gelu = {count, below, block.gelu_thresholds.data()};
    }
}

Sums Linear::sums(int g, const int32_t* row) const {
    const bool general = doubled || row_sums || !col.empty() || !input.row_scale.empty() || groups() > 1;
    const size_t at = static_cast<size_t>(g) * static_cast<size_t>(M);
    return {general ? Sums::general : Sums::plain, doubled, scale.data() + at, bias.data(),
            col.empty() ? nullptr : col.data() + at, row_sums ? row : nullptr, input.row_scale.data()};
}

void build_linear(const LinearSource& s, Isa isa, Linear& out) {
    const size_t M = static_cast<size_t>(s.M), K = static_cast<size_t>(s.K);
    if (s.M <= 0 || s.K <= 0 || s.groups <= 0 || s.K % s.groups || s.bits < 2 || s.bits > 8 ||
        s.packed_size != (M * K * static_cast<size_t>(s.bits) + 7) / 8 || s.x_bits < 1 || s.x_bits > 8) {
        throw std::invalid_argument("the shape of a linear layer and the size of its weight contradict each other");
    }
    out.M = s.M;
    out.K = s.K;
    out.group = s.K / s.groups;
    out.doubled = s.half_step;
    out.row_sums = s.half_step;
    out.bits = s.bits;
    out.input.bits = s.x_bits;
    out.input.low = s.x_low;
    out.input.high = s.x_high;
    out.input.scale = Floats(s.x_scale, K);
    out.input.inverse = Floats(K);
    out.input.offset = Floats(K);
    for (size_t k = 0; k < K; k++) {
        out.input.inverse[k] = 1.0f / s.x_scale[k];
        out.input.offset[k] = s.x_offset ? s.x_offset[k] : 0.0f;
    }
    if (s.x_row_scale) {
        const size_t tokens = static_cast<size_t>(s.tokens);
        out.input.row_scale = Floats(s.x_row_scale, tokens);
        out.input.row_inverse = Floats(tokens);
        for (size_t n = 0; n < tokens; n++) {
            out.input.row_inverse[n] = 1.0f / s.x_row_scale[n];
        }
    }
    const int kernel_bits = s.bits <= 4 ? s.bits : 8;
    out.kernel = &choose_kernel(kernel_bits, s.x_bits, isa);
    const std::vector<int8_t> codes = unpack_stream(s.packed, M * K, s.bits);
    const size_t group = static_cast<size_t>(out.group), groups = static_cast<size_t>(s.groups);
    const float half = s.half_step ? 0.5f : 1.0f;
    out.scale = Floats(groups * M);
    out.bias = Floats(M);
    if (s.x_low != 0) {
        out.col = Ints(groups * M);
    }
    for (size_t m = 0; m < M; m++) {
        double folded = s.bias ? static_cast<double>(s.bias[m]) : 0.0;
        for (size_t g = 0; g < groups; g++) {
            const int8_t* row = codes.data() + m * K + g * group;
            int32_t sum = 0;
            for (size_t k = 0; k < group; k++) {
                sum += row[k];
            }
            double offset = 0.0;
            if (s.x_offset) {
                const float* of = s.x_offset + g * group;
                double parts[4] = {0.0, 0.0, 0.0, 0.0};  // apart, so that additions do not wait for each other
                size_t k = 0;
                for (; k + 4 <= group; k += 4) {
                    for (size_t i = 0; i < 4; i++) {
                        parts[i] += static_cast<double>(row[k + i]) * static_cast<double>(of[k + i]);
                    }
                }
                for (; k < group; k++) {
                    parts[0] += static_cast<double>(row[k]) * static_cast<double>(of[k]);
                }
                offset = (parts[0] + parts[1]) + (parts[2] + parts[3]);
                for (k = 0; s.half_step && k < group; k++) {
                    offset += 0.5 * static_cast<double>(of[k]);
                }
            }
            folded += offset * s.value_scale[g * M + m];
            out.scale[g * M + m] = s.scale[g * M + m] * half;
            if (!out.col.empty()) {
                // A stored code is code - low. With a half step, sum_k (2 w + 1) x = 2 sum + row sum, and both move by low.
                out.col[g * M + m] = s.x_low * (s.half_step ? 2 * sum + static_cast<int32_t>(group) : sum);
            }
        }
        out.bias[m] = static_cast<float>(folded);
    }
    out.weights.clear();
    if (s.groups == 1) {
        out.weights.push_back(out.kernel->pack(codes.data(), s.M, s.K, kernel_bits));
        return;
    }
    std::vector<int8_t> part(M * group);
    for (size_t g = 0; g < groups; g++) {
        for (size_t m = 0; m < M; m++) {
            for (size_t k = 0; k < group; k++) {
                part[m * group + k] = codes[m * K + g * group + k];
            }
        }
        out.weights.push_back(out.kernel->pack(part.data(), s.M, out.group, kernel_bits));
    }
}

Windows build_windows(const StageShape& s, int down, int right) {
    const int H = s.map_height, W = s.map_width, wh = s.window_height, ww = s.window_width, N = s.window();
    const int padded = (N + kPad - 1) / kPad * kPad, columns = W / ww;
    Windows out;
    out.order = Ints(static_cast<size_t>(s.tokens()));
    out.mask.assign(static_cast<size_t>(s.windows()), -1);
    if (down || right) {
        out.region.resize(static_cast<size_t>(s.tokens()));
    }
    std::vector<float> masks;
    size_t row = 0;
    for (int window = 0; window < s.windows(); window++) {
        uint8_t seen = 0;
        const size_t first = row;
        for (int n = 0; n < N; n++, row++) {
            // A place in the map that was rolled up and left; behind its seam lie tokens of the opposite border.
            const int y = window / columns * wh + n / ww, x = window % columns * ww + n % ww;
            out.order[row] = (y + down) % H * W + (x + right) % W;
            if (!out.region.empty()) {
                const int region = 2 * (down > 0 && y >= H - down) + (right > 0 && x >= W - right);
                out.region[row] = static_cast<uint8_t>(region);
                seen = static_cast<uint8_t>(seen | 1 << region);
            }
        }
        if (seen & (seen - 1)) {
            const size_t at = masks.size();
            out.mask[static_cast<size_t>(window)] = static_cast<int>(at / static_cast<size_t>(kRegions * padded));
            masks.resize(at + static_cast<size_t>(kRegions * padded));
            for (int region = 0; region < kRegions; region++) {
                for (int n = 0; n < N; n++) {
                    const bool same = out.region[first + static_cast<size_t>(n)] == region;
                    masks[at + static_cast<size_t>(region * padded + n)] = same ? 0.0f : -100.0f;
                }
            }
        }
    }
    out.masks = Floats(masks.data(), masks.size());
    return out;
}

const char* name_of(Isa isa) {
    switch (isa) {
        case Isa::avx512vnni:
            return "avx512vnni";
        case Isa::avx2:
            return "avx2";
        case Isa::neon:
            return "neon";
        default:
            return "generic";
    }
}

namespace {
constexpr Isa kAll[] = {Isa::avx512vnni, Isa::avx2, Isa::neon, Isa::generic};
}

std::string isa_names() {
    std::string names;
    for (const Isa isa : kAll) {
        if (isa_supported(isa)) {
            names += (names.empty() ? "" : ", ") + std::string(name_of(isa));
        }
    }
    return names;
}

Isa choose_isa(const std::string& name) {
    if (name.empty()) {
        return best_isa();
    }
    for (const Isa isa : kAll) {
        if (name == name_of(isa) && isa_supported(isa)) {
            return isa;
        }
    }
    throw std::invalid_argument("QVIT_ISA=" + name + " names no instruction set that this processor and build have: use one of " +
                                isa_names() + ", or leave it unset.");
}

#if defined(QVIT_X86)
namespace {
bool has_avxvnni() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
}  // namespace
#endif

const OpTable& ops_of(Isa isa) {
    switch (isa) {
#if defined(QVIT_X86)
        case Isa::avx512vnni:
            return *avx512_ops();
        case Isa::avx2:
            return has_avxvnni() ? *avxvnni_ops() : *avx2_ops();
#elif defined(QVIT_ARM64)
        case Isa::neon:
            return *neon_ops();
#endif
        default:
            return *generic_ops();
    }
}

}  // namespace qvit::cpu
