#include "workspace.h"

#include <algorithm>
#include <numeric>

namespace qvit::cpu {

namespace {

constexpr int kGroupRows = 192;

size_t product(int a, int b) { return static_cast<size_t>(a) * static_cast<size_t>(b); }

// A row of codes of K channels that kernels may read in place.
int codes_pitch(const Linear& layer) {
    return std::max(round_up(layer.K, 64), static_cast<int>(layer.kernel->row_bytes(layer.K)));
}

}  // namespace

int step_columns(const Linear& layer, int unit) {
    return std::min(std::lcm(layer.kernel->panel, unit), round_up(layer.M, layer.kernel->panel));
}

Layout::Layout(const Model& model) {
    rows = round_up(model.stages[0].shape.tokens(), kRowAlign);
    super_columns = most_merged = tokens_padded = dim_padded = 0;
    panel_bytes = x[0] = x[1] = codes = hidden = prepared = q = k = v = map = bias = 0;
    groups = false;
    for (const Stage& stage : model.stages) {
        const StageShape& s = stage.shape;
        StageLayout l{};
        l.ld_x = row_pitch(s);
        l.ld_c = round_up(s.dim, 64);
        l.ld_hidden = round_up(s.hidden, 64);
        l.ld_prepared = 64;
        l.tokens_padded = round_up(s.window(), 16);
        l.dim4 = (s.head_dim() + 3) / 4;
        l.dim_padded = round_up(s.head_dim(), 16);
        l.q_window = static_cast<ptrdiff_t>(round_up(s.window(), kRowAlign)) * s.heads * 4 * l.dim4;
        l.k_window = static_cast<ptrdiff_t>(s.heads) * l.dim4 * l.tokens_padded * 4;
        l.v_window = static_cast<ptrdiff_t>(s.heads) * l.tokens_padded * l.dim_padded;
        l.group = std::max(1, (kGroupRows + s.window() / 2) / s.window()) * s.window();
        bool prepare = false;
        const auto add = [&](const Linear& layer, int unit, int* pitch) {
            if (pitch) {
                *pitch = std::max(*pitch, codes_pitch(layer));
            }
            const int columns = step_columns(layer, unit);
            const size_t panels = static_cast<size_t>(columns / layer.kernel->panel);
            super_columns = std::max(super_columns, columns);
            panel_bytes = std::max(panel_bytes, panels * layer.kernel->scratch_bytes(layer.group));
            groups |= layer.groups() > 1;
            if (layer.kernel->prepare || layer.groups() > 1) {
                prepare = true;
                l.ld_prepared = std::max(l.ld_prepared, round_up(static_cast<int>(layer.kernel->row_bytes(layer.group)), 64));
            }
        };
        if (&stage == &model.stages.front()) {
            add(model.patch, 1, &l.ld_hidden);
        } else {
            add(stage.merge, 1, &l.ld_hidden);
            most_merged = std::max(most_merged, stage.merge.K);
        }
        for (const Block& block : stage.blocks) {
            add(block.qkv, s.head_dim(), &l.ld_c);
            add(block.proj, 1, &l.ld_c);
            add(block.fc1, 1, &l.ld_c);
            add(block.fc2, 1, &l.ld_hidden);
        }
        if (&stage == &model.stages.back()) {
            for (const Linear& output : model.outputs) {
                add(output, 1, &l.ld_c);
            }
        }
        const int padded = round_up(s.tokens(), kRowAlign);
        const size_t windows = static_cast<size_t>(s.windows());
        x[stages.size() % 2] = std::max(x[stages.size() % 2], product(padded, l.ld_x));
        // 256 bytes more: kernels may read past the last row's codes.
        codes = std::max(codes, product(padded, l.ld_c) + 256);
        hidden = std::max(hidden, product(padded, l.ld_hidden) + 256);
        prepared = prepare ? std::max(prepared, product(padded, l.ld_prepared) + 256) : prepared;
        q = std::max(q, windows * static_cast<size_t>(l.q_window) + 256);
        k = std::max(k, windows * static_cast<size_t>(l.k_window));
        v = std::max(v, windows * static_cast<size_t>(l.v_window) + 256);
        map = std::max(map, product(round_up(s.window(), kRowAlign), s.window()));
        bias = model.shape.windowed ? std::max(bias, product(s.window(), l.tokens_padded) + kPad) : 0;
        tokens_padded = std::max(tokens_padded, l.tokens_padded);
        dim_padded = std::max(dim_padded, l.dim_padded);
        stages.push_back(l);
    }
}

ImageSpace::ImageSpace(const Model& model, const Layout& l) {
    x[0] = Floats(l.x[0]);
    x[1] = Floats(l.x[1]);
    codes = aligned_bytes(l.codes);
    hidden = aligned_bytes(l.hidden);
    if (l.prepared) {
        prepared = aligned_bytes(l.prepared);
    }
    q = aligned_bytes(l.q);
    for (int i = 0; i < (model.shape.windowed ? 1 : 2); i++) {
        k[i] = aligned_bytes(l.k);
        v[i] = aligned_bytes(l.v);
    }
    row_sums = Ints(static_cast<size_t>(l.rows));
}

ThreadSpace::ThreadSpace(const Model& model, const Layout& l) {
    panels = aligned_bytes(l.panel_bytes + 256);
    sums = aligned_bytes(product(kMostChunk, l.super_columns) * 4 + 256);
    attention = aligned_bytes(attention_scratch(l.tokens_padded, l.dim_padded));
    map = aligned_bytes(l.map);
    unpacked.resize(static_cast<size_t>(l.super_columns) / 16);
    int classes = 0;
    for (const Linear& output : model.outputs) {
        classes = std::max(classes, output.M);
    }
    logits = Floats(static_cast<size_t>(classes));
    if (l.groups) {
        accumulators = Floats(product(l.rows, l.super_columns));
    }
    merged = Floats(static_cast<size_t>(l.most_merged));
    bias = Floats(l.bias);
}

}  // namespace qvit::cpu
