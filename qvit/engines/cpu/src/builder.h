// Takes a model over from Python, part by part: `Builder` of the module.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>

#include "model.h"

namespace nb = nanobind;

namespace qvit::cpu {
namespace {

template <class T>
using Array = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <class T>
using MaybeArray = std::optional<Array<T>>;

void check(bool holds, const char* what) {
    if (!holds) {
        throw std::invalid_argument(std::string("the parts of the model contradict each other: ") + what);
    }
}

template <class T>
const T* data_of(const Array<T>& array, size_t size, const char* what) {
    check(array.size() == size, what);
    return array.data();
}

template <class T>
const T* data_of(const MaybeArray<T>& array, size_t size, const char* what) {
    return array ? data_of(*array, size, what) : nullptr;
}

Floats floats_of(const Array<float>& array, size_t size, const char* what) { return Floats(data_of(array, size, what), size); }

// [H][D] -> [H][DP], zeros between.
Floats padded_heads(const MaybeArray<float>& array, int heads, int dim, const char* what) {
    const int padded = (dim + 15) / 16 * 16;
    Floats out(static_cast<size_t>(heads) * static_cast<size_t>(padded));
    const float* from = data_of(array, static_cast<size_t>(heads) * static_cast<size_t>(dim), what);
    for (int h = 0; h < heads && from; h++) {
        for (int d = 0; d < dim; d++) {
            out[static_cast<size_t>(h * padded + d)] = from[h * dim + d];
        }
    }
    return out;
}

Floats inverse_of(const Floats& scale) {
    Floats inverse(scale.size());
    for (size_t i = 0; i < scale.size(); i++) {
        inverse[i] = 1.0f / scale[i];
    }
    return inverse;
}

class Builder {
   public:
    Builder(const std::string& isa, const std::map<std::string, int>& shape) {
        const auto get = [&](const char* name) {
            const auto found = shape.find(name);
            check(found != shape.end() && found->second >= 0, name);
            return found->second;
        };
        Shape& s = model.shape;
        model.isa = choose_isa(isa);
        model.ops = &ops_of(model.isa);
        s.tokens = get("tokens");
        s.prefix = get("prefix");
        s.dim = get("dim");
        s.depth = get("depth");
        s.heads = get("heads");
        s.hidden = get("hidden");
        s.classes = get("classes");
        s.channels = get("channels");
        s.height = get("height");
        s.width = get("width");
        s.patch_height = get("patch_height");
        s.patch_width = get("patch_width");
        s.activation = static_cast<Activation>(get("activation"));
        s.average = get("average") != 0;
        s.average_all = get("average_all") != 0;
        s.distilled = get("distilled") != 0;
        // Bounded before anything is multiplied in 32 bits.
        for (const int size : {s.dim, s.hidden, s.classes, s.channels, s.height, s.width}) {
            check(size > 0 && size <= 1 << 20, "sizes");
        }
        check(s.depth > 0 && s.depth <= 1 << 12 && s.tokens <= 1 << 16 && s.prefix <= s.tokens, "sizes");
        check(s.heads > 0 && s.dim > 0 && s.dim % s.heads == 0 && s.head_dim() <= 512, "heads");
        check(s.patch_height > 0 && s.patch_width > 0 && s.patch_height <= s.height && s.patch_width <= s.width, "patches");
        check(int64_t{s.channels} * s.patch_height <= (1 << 30) / s.patch_width, "patches");
        check(s.tokens == s.prefix + int64_t{s.patch_columns()} * (s.height / s.patch_height), "tokens");
        check(s.tokens > 0 && (s.average || s.prefix > (s.distilled ? 1 : 0)), "pooled tokens");
        check(!s.average || s.average_all || s.tokens > s.prefix, "pooled tokens");
        model.blocks.resize(static_cast<size_t>(s.depth));
        model.outputs.resize(s.distilled ? 2 : 1);
    }

    Block& block(int index) {
        check(index >= 0 && index < model.shape.depth, "a block's number");
        return model.blocks[static_cast<size_t>(index)];
    }

    void set_linear(const std::string& which, int index, int bits, const Array<uint8_t>& packed, const Array<float>& scale,
                    const Array<double>& value_scale, bool half_step, const MaybeArray<float>& bias, int x_bits, int x_low,
                    int x_high, const Array<float>& x_scale, const MaybeArray<float>& x_offset,
                    const MaybeArray<float>& x_row_scale) {
        const Shape& s = model.shape;
        LinearSource from{};
        Linear* to = nullptr;
        if (which == "patch") {
            to = &model.patch, from.M = s.dim, from.K = s.patch_features();
        } else if (which == "output") {
            check(index >= 0 && static_cast<size_t>(index) < model.outputs.size(), "outputs");
            to = &model.outputs[static_cast<size_t>(index)], from.M = s.classes, from.K = s.dim;
        } else if (which == "qkv") {
            to = &block(index).qkv, from.M = 3 * s.dim, from.K = s.dim;
        } else if (which == "proj") {
            to = &block(index).proj, from.M = s.dim, from.K = s.dim;
        } else if (which == "fc1") {
            to = &block(index).fc1, from.M = s.hidden, from.K = s.dim;
        } else {
            check(which == "fc2", "a linear layer's name");
            to = &block(index).fc2, from.M = s.dim, from.K = s.hidden;
        }
        const size_t M = static_cast<size_t>(from.M), K = static_cast<size_t>(from.K);
        from.bits = bits;
        from.packed = packed.data();
        from.packed_size = packed.size();
        check(scale.size() % M == 0 && scale.size() >= M, "scales");
        from.groups = static_cast<int>(scale.size() / M);
        from.scale = scale.data();
        from.value_scale = data_of(value_scale, scale.size(), "scales");
        from.half_step = half_step;
        from.bias = data_of(bias, M, "a bias");
        from.x_bits = x_bits;
        from.x_low = x_low;
        from.x_high = x_high;
        check(x_low <= 0 && x_high > 0 && x_high - x_low < 256 && x_high - x_low < (1 << x_bits), "the range of codes");
        from.x_scale = data_of(x_scale, K, "an input's scales");
        from.x_offset = data_of(x_offset, K, "an input's offsets");
        from.x_row_scale = data_of(x_row_scale, static_cast<size_t>(s.tokens), "an input's scales by token");
        from.tokens = s.tokens;
        build_linear(from, model.isa, *to);
    }

    void set_norm(const std::string& which, int index, const Array<float>& weight, const Array<float>& bias, double eps,
                  const MaybeArray<float>& gain, const MaybeArray<float>& shift, float margin) {
        const size_t C = static_cast<size_t>(model.shape.dim);
        NormConstants norm;
        norm.weight = floats_of(weight, C, "a LayerNorm");
        norm.bias = floats_of(bias, C, "a LayerNorm");
        if (gain && shift) {
            norm.gain = floats_of(*gain, C, "a LayerNorm");
            norm.shift = floats_of(*shift, C, "a LayerNorm");
        }
        norm.eps = eps;
        norm.margin = margin;
        NormConstants& to = which == "norm_pre"  ? model.norm_pre
                            : which == "norm"    ? model.norm
                            : which == "fc_norm" ? model.fc_norm
                            : which == "norm1"   ? block(index).norm1
                                                 : block(index).norm2;
        to = std::move(norm);
    }

    void set_layer_scale(int index, int which, const Array<float>& gamma) {
        (which == 1 ? block(index).ls1 : block(index).ls2) = floats_of(gamma, static_cast<size_t>(model.shape.dim), "a LayerScale");
    }

    void set_heads(int index, int which, bool rectify, double eps, int low, int high, bool half_row, int stored_bias,
                   float margin, const std::vector<Array<float>>& constants, const MaybeArray<float>& row_scale) {
        const Shape& s = model.shape;
        const int D = s.head_dim();
        check(which >= 0 && which < 3 && low < high && high - low < 256 && low + stored_bias >= (which == 0 ? 0 : -128) &&
                  high + stored_bias <= (which == 0 ? 255 : 127),
              "the range of codes");
        check(constants.size() == 6, "q, k or v");
        HeadConstants& h = block(index).heads[which];
        h.codes.rectify = rectify;
        h.codes.eps = eps;
        h.codes.low = static_cast<float>(low);
        h.codes.high = static_cast<float>(high);
        h.codes.half_row = half_row;
        h.codes.stored_bias = stored_bias;
        h.codes.margin = margin;
        h.codes.ld = (D + 15) / 16 * 16;
        Floats* const to[] = {&h.gain, &h.shift, &h.weight, &h.bias, &h.offset, &h.scale};
        for (size_t i = 0; i < 6; i++) {
            *to[i] = padded_heads(constants[i], s.heads, D, "q, k or v");
        }
        if (row_scale) {
            h.row_scale = floats_of(*row_scale, static_cast<size_t>(s.heads) * static_cast<size_t>(s.tokens), "scales by token");
            h.row_inverse = inverse_of(h.row_scale);
        }
    }

    void set_gelu(int index, float margin) {
        Block& b = block(index);
        check(b.fc1.kernel && b.fc2.kernel, "GELU comes after fc1 and fc2");
        b.gelu_margin = margin;
        build_thresholds(*model.ops, model.shape.activation, b);
    }

    // numbers: see `Attention` and `HeadLayout`.
    void set_attention(int index, const std::map<std::string, int>& numbers, float factor, float margin,
                       const Array<float>& q_scale, const Array<float>& k_scale, const MaybeArray<float>& q_offset,
                       const Array<float>& p_scale, const Array<float>& v_scale, const MaybeArray<float>& v_offset) {
        const Shape& s = model.shape;
        const int D = s.head_dim(), H = s.heads, N = s.tokens, padded = (N + 15) / 16 * 16;
        const size_t HN = static_cast<size_t>(H) * static_cast<size_t>(N);
        Block& b = block(index);
        b.q_scale = floats_of(q_scale, HN, "q's scales");
        b.p_scale = floats_of(p_scale, HN, "the map's scales");
        b.v_scale = padded_heads(v_scale, H, D, "v's scales");
        b.v_offset = padded_heads(v_offset, H, D, "v's offsets");
        b.k_scale = Floats(static_cast<size_t>(H) * static_cast<size_t>(padded));
        const float* from = data_of(k_scale, HN, "k's scales");
        for (int h = 0; h < H; h++) {
            for (int n = 0; n < N; n++) {
                b.k_scale[static_cast<size_t>(h * padded + n)] = from[h * N + n];
            }
        }
        if (q_offset) {
            b.q_offset = padded_heads(q_offset, H, D, "q's offsets");
        }
        const auto get = [&](const char* name) {
            const auto found = numbers.find(name);
            check(found != numbers.end(), name);
            return found->second;
        };
        Attention& a = b.attention;
        HeadLayout& l = a.layout;
        l.heads = H;
        l.head_dim = D;
        l.tokens = N;
        l.tokens_padded = padded;
        l.dim4 = (D + 3) / 4;
        l.dim_padded = (D + 15) / 16 * 16;
        l.k_sum_factor = get("k_sum_factor");
        l.k_code_bias = get("k_code_bias");
        l.q_offset = b.q_offset.data();
        a.wide_q = get("wide_q") != 0;
        a.wide_p = get("wide_p") != 0;
        a.doubled = get("doubled") != 0;
        a.row_bias = get("row_bias");
        a.k_uniform = get("k_uniform") != 0 && !q_offset;
        float largest_q = 0.0f, largest_k = 0.0f;
        for (size_t i = 0; i < HN; i++) {
            largest_q = std::max(largest_q, q_scale.data()[i]);
            largest_k = std::max(largest_k, k_scale.data()[i]);
        }
        a.bounded = a.k_uniform && static_cast<float>(get("most_sum")) * largest_q * largest_k <= kMostScore;
        a.p_high = static_cast<float>(get("p_high"));
        check(a.p_high >= 1.0f && a.p_high <= 255.0f && (a.wide_p || a.p_high < 128.0f), "the softmax map's codes");
        a.margin = margin;
        a.v_mul = get("v_mul");
        a.v_row = get("v_row");
        a.factor = factor;
        a.q_scale = b.q_scale.data();
        a.k_scale = b.k_scale.data();
        a.p_scale = b.p_scale.data();
        a.v_scale = b.v_scale.data();
        a.v_offset = b.v_offset.data();
    }

    void set_pixels(const Array<float>& std, const Array<float>& offset, float scale, const Array<uint8_t>& table) {
        const size_t C = static_cast<size_t>(model.shape.channels);
        const float* s = data_of(std, C, "std");
        const float* o = data_of(offset, C, "mean");
        const uint8_t* t = data_of(table, C * 256, "the table of pixels");
        model.pixel_std.assign(s, s + C);
        model.pixel_offset.assign(o, o + C);
        model.pixel_table.assign(t, t + C * 256);
        model.pixel_scale = scale;
        model.pixels_are_codes = true;
        for (size_t i = 0; i < C * 256; i++) {
            model.pixels_are_codes &= t[i] == i % 256;
        }
    }

    void set_embed(const Array<float>& embed) {
        const Shape& s = model.shape;
        const float* from = data_of(embed, static_cast<size_t>(s.tokens) * static_cast<size_t>(s.dim), "the position embedding");
        model.embed = Floats(static_cast<size_t>(s.tokens) * static_cast<size_t>(model.ld()));
        for (int n = 0; n < s.tokens; n++) {
            for (int c = 0; c < s.dim; c++) {
                model.embed[static_cast<size_t>(n * model.ld() + c)] = from[static_cast<ptrdiff_t>(n) * s.dim + c];
            }
        }
    }

    Model model;
};

}  // namespace
}  // namespace qvit::cpu
