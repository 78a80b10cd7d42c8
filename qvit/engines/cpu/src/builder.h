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
using Sizes = std::map<std::string, int>;

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
    // shape: of the whole model; stages: of each stage, the first one's map being the patches and the prefix tokens.
    Builder(const std::string& isa, const Sizes& shape, const std::vector<Sizes>& stages) {
        Shape& s = model.shape;
        model.isa = choose_isa(isa);
        model.ops = &ops_of(model.isa);
        s.prefix = size_of(shape, "prefix");
        s.classes = size_of(shape, "classes");
        s.channels = size_of(shape, "channels");
        s.height = size_of(shape, "height");
        s.width = size_of(shape, "width");
        s.patch_height = size_of(shape, "patch_height");
        s.patch_width = size_of(shape, "patch_width");
        s.activation = static_cast<Activation>(size_of(shape, "activation"));
        s.average = size_of(shape, "average") != 0;
        s.average_all = size_of(shape, "average_all") != 0;
        s.distilled = size_of(shape, "distilled") != 0;
        s.windowed = size_of(shape, "windowed") != 0;
        s.half = size_of(shape, "half") != 0;
        // Bounded before anything is multiplied in 32 bits.
        for (const int size : {s.classes, s.channels, s.height, s.width}) {
            check(size > 0 && size <= 1 << 20, "sizes");
        }
        check(s.patch_height > 0 && s.patch_width > 0 && s.patch_height <= s.height && s.patch_width <= s.width, "patches");
        check(int64_t{s.channels} * s.patch_height <= (1 << 30) / s.patch_width, "patches");
        check(!stages.empty() && stages.size() <= 16 && (s.windowed || stages.size() == 1), "the number of stages");
        for (const Sizes& sizes : stages) {
            add_stage(sizes);
        }
        const int tokens = model.stages[0].shape.tokens(), last = model.stages.back().shape.tokens();
        check(tokens == s.prefix + int64_t{s.patch_columns()} * (s.height / s.patch_height), "tokens");
        check(!s.windowed || (s.average && s.prefix == 0), "a prefix in windows");
        check(s.average || s.prefix > (s.distilled ? 1 : 0), "pooled tokens");
        check(!s.average || s.average_all || last > s.prefix, "pooled tokens");
        model.outputs.resize(s.distilled ? 2 : 1);
    }

    // Blocks are numbered through all stages.
    Block& block(int index) { return stage_of(index).blocks[static_cast<size_t>(index)]; }

    // Of block `index`, which becomes its number within the stage.
    Stage& stage_of(int& index) {
        check(index >= 0, "a block's number");
        for (Stage& stage : model.stages) {
            if (index < stage.shape.depth) {
                return stage;
            }
            index -= stage.shape.depth;
        }
        throw std::invalid_argument("the parts of the model contradict each other: a block's number");
    }

    const StageShape& shape_of(int index) { return stage_of(index).shape; }

    void set_linear(const std::string& which, int index, int bits, const Array<uint8_t>& packed, const Array<float>& scale,
                    const Array<double>& value_scale, bool half_step, const MaybeArray<float>& bias, int x_bits, int x_low,
                    int x_high, const Array<float>& x_scale, const MaybeArray<float>& x_offset,
                    const MaybeArray<float>& x_row_scale) {
        LinearSource from{};
        Linear* to = nullptr;
        from.tokens = model.stages[0].shape.tokens();
        if (which == "patch") {
            to = &model.patch, from.M = model.stages[0].shape.dim, from.K = model.shape.patch_features();
        } else if (which == "merge") {
            Stage& stage = merging_stage(index);
            to = &stage.merge, from.M = stage.shape.dim, from.K = 4 * model.stages[static_cast<size_t>(index) - 1].shape.dim;
        } else if (which == "output") {
            check(index >= 0 && static_cast<size_t>(index) < model.outputs.size(), "outputs");
            to = &model.outputs[static_cast<size_t>(index)];
            from.M = model.shape.classes, from.K = model.stages.back().shape.dim;
        } else {
            const StageShape& s = shape_of(index);
            from.tokens = s.tokens();
            if (which == "qkv") {
                to = &block(index).qkv, from.M = 3 * s.dim, from.K = s.dim;
            } else if (which == "proj") {
                to = &block(index).proj, from.M = s.dim, from.K = s.dim;
            } else if (which == "fc1") {
                to = &block(index).fc1, from.M = s.hidden, from.K = s.dim;
            } else {
                check(which == "fc2", "a linear layer's name");
                to = &block(index).fc2, from.M = s.dim, from.K = s.hidden;
            }
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
        from.x_row_scale = data_of(x_row_scale, static_cast<size_t>(from.tokens), "an input's scales by token");
        check(!from.x_row_scale || !model.shape.windowed, "scales by token in windows");
        build_linear(from, model.isa, *to);
    }

    void set_norm(const std::string& which, int index, const Array<float>& weight, const Array<float>& bias, double eps,
                  const MaybeArray<float>& gain, const MaybeArray<float>& shift, float margin) {
        const size_t C = static_cast<size_t>(which == "norm_pre" ? model.stages[0].shape.dim
                                             : which == "merge" ? 4 * model.stages[merging_stage_index(index) - 1].shape.dim
                                             : which == "norm1" || which == "norm2" ? shape_of(index).dim
                                                                                    : model.stages.back().shape.dim);
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
                            : which == "merge"   ? merging_stage(index).merge_norm
                            : which == "norm1"   ? block(index).norm1
                                                 : checked_norm2(which, index);
        to = std::move(norm);
    }

    void set_layer_scale(int index, int which, const Array<float>& gamma) {
        const size_t C = static_cast<size_t>(shape_of(index).dim);
        (which == 1 ? block(index).ls1 : block(index).ls2) = floats_of(gamma, C, "a LayerScale");
    }

    // Before the block's attention. table: [(2 h - 1) (2 w - 1)][H], rows by distance, query less key.
    void set_windows(int index, int down, int right, const Array<float>& table) {
        check(model.shape.windowed, "windows");
        Block& b = block(index);
        Stage& stage = stage_of(index);
        const StageShape& s = stage.shape;
        check(down >= 0 && down < s.window_height && right >= 0 && right < s.window_width, "the shift of windows");
        b.shifted = down || right;
        Windows& windows = stage.windows[b.shifted];
        if (!windows) {
            windows = build_windows(s, down, right);
        }
        check(windows.order[0] == down * s.map_width + right, "the shift of windows");
        const int columns = 2 * s.window_width - 1, distances = (2 * s.window_height - 1) * columns;
        const float* from = data_of(table, static_cast<size_t>(distances) * static_cast<size_t>(s.heads), "position biases");
        b.position_bias = Floats(static_cast<size_t>(distances) * static_cast<size_t>(s.heads));
        b.attention.most_bias = 0.0f;
        for (int h = 0; h < s.heads; h++) {
            for (int d = 0; d < distances; d++) {
                const float bias = from[(d / columns * columns + columns - 1 - d % columns) * s.heads + h];
                b.position_bias[static_cast<size_t>(h * distances + d)] = bias;
                b.attention.most_bias = std::max(b.attention.most_bias, bias < 0.0f ? -bias : bias);
            }
        }
    }

    void set_heads(int index, int which, bool rectify, double eps, int low, int high, bool half_row, int stored_bias,
                   float margin, const std::vector<Array<float>>& constants, const MaybeArray<float>& row_scale) {
        const StageShape& s = shape_of(index);
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
            h.row_scale = floats_of(*row_scale, static_cast<size_t>(s.heads) * static_cast<size_t>(s.window()), "scales by token");
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
    void set_attention(int index, const Sizes& numbers, float factor, float margin,
                       const Array<float>& q_scale, const Array<float>& k_scale, const MaybeArray<float>& q_offset,
                       const Array<float>& p_scale, const Array<float>& v_scale, const MaybeArray<float>& v_offset) {
        const StageShape& s = shape_of(index);
        const int D = s.head_dim(), H = s.heads, N = s.window(), padded = (N + 15) / 16 * 16;
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
        a.bounded = a.k_uniform && static_cast<float>(get("most_sum")) * largest_q * largest_k + a.most_bias <= kMostScore;
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
        const StageShape& s = model.stages[0].shape;
        const size_t N = static_cast<size_t>(s.tokens()), C = static_cast<size_t>(s.dim), ld = static_cast<size_t>(row_pitch(s));
        const float* from = data_of(embed, N * C, "the position embedding");
        model.embed = Floats(N * ld);
        for (size_t n = 0; n < N; n++) {
            for (size_t c = 0; c < C; c++) {
                model.embed[n * ld + c] = from[n * C + c];
            }
        }
    }

    Model model;

   private:
    static int size_of(const Sizes& sizes, const char* name) {
        const auto found = sizes.find(name);
        check(found != sizes.end() && found->second >= 0, name);
        return found->second;
    }

    void add_stage(const Sizes& sizes) {
        Stage stage;
        StageShape& s = stage.shape;
        s.map_height = size_of(sizes, "map_height");
        s.map_width = size_of(sizes, "map_width");
        s.window_height = size_of(sizes, "window_height");
        s.window_width = size_of(sizes, "window_width");
        s.dim = size_of(sizes, "dim");
        s.depth = size_of(sizes, "depth");
        s.heads = size_of(sizes, "heads");
        s.hidden = size_of(sizes, "hidden");
        check(s.dim > 0 && s.dim <= 1 << 20 && s.hidden > 0 && s.hidden <= 1 << 20, "sizes");
        check(s.depth > 0 && s.depth <= 1 << 12, "sizes");
        check(s.heads > 0 && s.dim % s.heads == 0 && s.head_dim() <= 512, "heads");
        check(s.map_height > 0 && s.map_width > 0 && int64_t{s.map_height} * s.map_width <= 1 << 16, "tokens");
        check(s.window_height > 0 && s.window_width > 0 && s.map_height % s.window_height == 0 && s.map_width % s.window_width == 0,
              "windows");
        check(model.shape.windowed || s.windows() == 1, "windows");
        if (!model.stages.empty()) {
            const StageShape& before = model.stages.back().shape;
            check(before.map_height == 2 * s.map_height && before.map_width == 2 * s.map_width, "the map of a stage");
        }
        stage.blocks.resize(static_cast<size_t>(s.depth));
        model.stages.push_back(std::move(stage));
    }

    size_t merging_stage_index(int index) const {
        check(index > 0 && static_cast<size_t>(index) < model.stages.size(), "a stage's number");
        return static_cast<size_t>(index);
    }
    Stage& merging_stage(int index) { return model.stages[merging_stage_index(index)]; }

    NormConstants& checked_norm2(const std::string& which, int index) {
        check(which == "norm2", "a LayerNorm's name");
        return block(index).norm2;
    }
};

}  // namespace
}  // namespace qvit::cpu
