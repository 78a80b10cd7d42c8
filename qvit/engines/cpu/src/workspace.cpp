#include "workspace.h"

#include <algorithm>
#include <numeric>

namespace qvit::cpu {

namespace {

template <class Function>
void for_each_linear(const Model& model, const Function& f) {
    f(model.patch, 1);
    for (const Block& block : model.blocks) {
        f(block.qkv, model.shape.head_dim());
        f(block.proj, 1);
        f(block.fc1, 1);
        f(block.fc2, 1);
    }
    for (const Linear& output : model.outputs) {
        f(output, 1);
    }
}

// A row of codes of K channels that kernels may read in place.
int row_pitch(const Linear& layer) {
    return std::max(round_up(layer.K, 64), static_cast<int>(layer.kernel->row_bytes(layer.K)));
}

}  // namespace

int step_columns(const Linear& layer, int unit) {
    return std::min(std::lcm(layer.kernel->panel, unit), round_up(layer.M, layer.kernel->panel));
}

Layout::Layout(const Model& model) {
    const Shape& s = model.shape;
    rows = round_up(s.tokens, kRowAlign);
    ld_x = model.ld();
    ld_c = round_up(s.dim, 64);
    ld_hidden = std::max(round_up(s.hidden, 64), row_pitch(model.patch));
    ld_prepared = 64;
    tokens_padded = round_up(s.tokens, 16);
    dim4 = (s.head_dim() + 3) / 4;
    dim_padded = round_up(s.head_dim(), 16);
    super_columns = 0;
    panel_bytes = 0;
    groups = prepare = row_sums = false;
    for_each_linear(model, [&](const Linear& layer, int unit) {
        if (&layer != &model.patch) {
            int& pitch = layer.K == s.dim ? ld_c : ld_hidden;
            pitch = std::max(pitch, row_pitch(layer));
        }
        const int columns = step_columns(layer, unit);
        const size_t panels = static_cast<size_t>(columns / layer.kernel->panel);
        super_columns = std::max(super_columns, columns);
        panel_bytes = std::max(panel_bytes, panels * layer.kernel->scratch_bytes(layer.group));
        groups |= layer.groups() > 1;
        row_sums |= layer.row_sums;
        if (layer.kernel->prepare || layer.groups() > 1) {
            prepare = true;
            ld_prepared = std::max(ld_prepared, round_up(static_cast<int>(layer.kernel->row_bytes(layer.group)), 64));
        }
    });
    // Rows of K channels and of the hidden layer may be the same numbers: both buffers then have the wider pitch.
    ld_hidden = std::max(ld_hidden, s.hidden == s.dim ? ld_c : 0);
}

ImageSpace::ImageSpace(const Model& model, const Layout& l) {
    const auto n = [](int a, int b) { return static_cast<size_t>(a) * static_cast<size_t>(b); };
    const Shape& s = model.shape;
    x = Floats(n(l.rows, l.ld_x));
    // 256 bytes more: kernels may read past the last row's codes.
    codes = aligned_bytes(n(l.rows, l.ld_c) + 256);
    hidden = aligned_bytes(n(l.rows, l.ld_hidden) + 256);
    if (l.prepare) {
        prepared = aligned_bytes(n(l.rows, l.ld_prepared) + 256);
    }
    q = aligned_bytes(n(l.rows, s.heads * 4 * l.dim4) + 256);
    for (int i = 0; i < 2; i++) {
        k[i] = aligned_bytes(n(s.heads, l.dim4) * static_cast<size_t>(l.tokens_padded) * 4);
        v[i] = aligned_bytes(n(s.heads, l.tokens_padded) * static_cast<size_t>(l.dim_padded) + 256);
    }
    row_sums = Ints(static_cast<size_t>(l.rows));
}

ThreadSpace::ThreadSpace(const Model& model, const Layout& l) {
    panels = aligned_bytes(l.panel_bytes + 256);
    sums = aligned_bytes(static_cast<size_t>(kRowChunk) * static_cast<size_t>(l.super_columns) * 4 + 256);
    attention = aligned_bytes(attention_scratch(l.tokens_padded, l.dim_padded));
    map = aligned_bytes(static_cast<size_t>(l.rows) * static_cast<size_t>(model.shape.tokens));
    unpacked.resize(static_cast<size_t>(l.super_columns) / 16);
    int classes = 0;
    for (const Linear& output : model.outputs) {
        classes = std::max(classes, output.M);
    }
    logits = Floats(static_cast<size_t>(classes));
    if (l.groups) {
        accumulators = Floats(static_cast<size_t>(l.rows) * static_cast<size_t>(l.super_columns));
    }
}

}  // namespace qvit::cpu
