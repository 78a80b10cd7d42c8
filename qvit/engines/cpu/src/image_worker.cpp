#include "image_worker.h"

#include <algorithm>
#include <cstring>

namespace qvit::cpu {

ImageWorker::ImageWorker(const Model& model, const Layout& layout, ImageSpace& image, ThreadSpace& own, bool profile,
                         const Taps* taps, int index, int part, int parts)
    : m_(model), layout_(layout), ops_(*model.ops), image_(image), own_(own), profile_(profile), taps_(taps), index_(index),
      part_(part), parts_(parts) {
    if (profile) {
        since_ = clock_seconds();
    }
}

void ImageWorker::run(const uint8_t* pixels, const float* floats, float* logits) {
    enter(0);
    patches(pixels, floats);
    for (size_t stage = 0; stage < m_.stages.size(); stage++) {
        if (stage) {
            merge();
        }
        split(s_->tokens(), s_->window());
        for (size_t i = 0; i < m_.stages[stage].blocks.size(); i++) {
            block(i);
        }
    }
    outputs(logits);
}

void ImageWorker::enter(size_t stage) {
    stage_ = stage;
    s_ = &m_.stages[stage].shape;
    l_ = &layout_.stages[stage];
    x_ = image_.x[stage % 2].data();
}

void ImageWorker::split(int tokens, int window) {
    const int windows = tokens / window, steps = round_up(window, kRowAlign) / kRowAlign;
    whole_ = windows % parts_ == 0;
    const auto start = [&](int part) {
        if (whole_) {
            return windows / parts_ * part * window;
        }
        const int step = static_cast<int>(static_cast<int64_t>(windows) * steps * part / parts_);
        return step / steps * window + std::min(window, step % steps * kRowAlign);
    };
    row0_ = start(part_);
    row1_ = start(part_ + 1);
}

template <class Function>
void ImageWorker::by_run(const Windows& windows, int first, int last, const Function& f) const {
    if (windows.order.empty()) {
        if (first < last) {
            f(first, first, last - first);
        }
        return;
    }
    for (int row = first; row < last;) {
        const int token = windows.order[static_cast<size_t>(row)];
        int count = 1;
        while (row + count < last && windows.order[static_cast<size_t>(row + count)] == token + count) {
            count++;
        }
        f(row, token, count);
        row += count;
    }
}

// --- linear layers ------------------------------------------------------------------------------------------------------

const uint8_t* ImageWorker::prepared(const Linear& layer, int g, const uint8_t* codes, int ld, int first, int last, int& pitch) {
    const uint8_t* rows = codes + static_cast<ptrdiff_t>(first) * ld + static_cast<ptrdiff_t>(g) * layer.group;
    if (layer.row_sums) {
        for (int r = first; r < last; r++) {
            int32_t sum = 0;
            for (int k = 0; k < layer.group; k++) {
                sum += rows[static_cast<ptrdiff_t>(r - first) * ld + k];
            }
            image_.row_sums[static_cast<size_t>(r)] = sum;
        }
    }
    pitch = ld;
    if (layer.kernel->prepare) {
        pitch = round_up(static_cast<int>(layer.kernel->row_bytes(layer.group)), 64);
        uint8_t* out = image_.prepared.get() + static_cast<ptrdiff_t>(first) * l_->ld_prepared;
        layer.kernel->prepare(rows, ld, last - first, layer.group, out, pitch);
        rows = out;
    }
    return rows;
}

template <class Epilogue>
void ImageWorker::linear(const Linear& layer, const uint8_t* codes, int ld, int first, int last, int window, int unit, int from,
                         int to, Phase phase, const Linear* next, const Epilogue& epilogue) {
    if (first >= last) {
        return;
    }
    const GemmKernel& kernel = *layer.kernel;
    const int step = step_columns(layer, unit), panel = kernel.panel;
    const size_t panel_bytes = kernel.scratch_bytes(layer.group);
    const int groups = layer.groups();
    auto& unpacked = own_.unpacked;
    int32_t* sums = reinterpret_cast<int32_t*>(own_.sums.get());
    const auto rows_from = [&](int row) {
        const int left = (window ? std::min(last, (row / window + 1) * window) : last) - row;
        return left <= (window ? kMostChunk : kRowChunk) ? left : kRowChunk;
    };
    int pitch = 0;
    const uint8_t* rows = groups == 1 ? prepared(layer, 0, codes, ld, first, last, pitch) : nullptr;
    tick(kPrepare);
    for (int c0 = from; c0 < to; c0 += step) {
        const int cols = std::min(step, to - c0);
        const int panels = (cols + panel - 1) / panel;
        float* accumulators = own_.accumulators.data();
        if (groups > 1) {
            std::fill_n(accumulators, static_cast<size_t>(last - first) * static_cast<size_t>(step), 0.0f);
        }
        for (int g = 0; g < groups; g++) {
            if (groups > 1) {
                rows = prepared(layer, g, codes, ld, first, last, pitch);
            }
            for (int p = 0; p < panels; p++) {
                uint8_t* scratch = own_.panels.get() + static_cast<size_t>(p) * panel_bytes;
                unpacked[static_cast<size_t>(p)] = kernel.unpack(layer.weights[static_cast<size_t>(g)], c0 / panel + p, scratch);
            }
            tick(kUnpack);
            // What is needed next comes into the second-level cache meanwhile: weights do not stay there from image to image.
            const bool more = c0 + step < to || groups > 1;
            const Linear* coming = more ? &layer : next;
            const int panel0 = more ? (c0 + step) / panel : 0, coming_panels = coming ? (more ? step / panel : 1) : 0;
            const int chunks = (last - first + kRowChunk - 1) / kRowChunk;
            for (int r = first, count = 0; r < last; r += count) {
                count = rows_from(r);
                for (int p = 0; p < coming_panels; p++) {
                    prefetch_panel(coming->weights[0], panel0 + p, (r - first) / kRowChunk, chunks);
                }
                const uint8_t* some = rows + static_cast<ptrdiff_t>(r - first) * pitch;
                for (int p = 0; p < panels; p++) {
                    kernel.sums(some, pitch, count, unpacked[static_cast<size_t>(p)], layer.group, sums + p * panel, step);
                }
                tick(kGemm);
                const Tile tile{sums, step, r, count, c0, cols};
                const Sums of = layer.sums(g, image_.row_sums.data());
                if (groups == 1) {
                    epilogue(tile, of);
                    tick(phase);
                } else {
                    ops_.accumulate(tile, of, accumulators + static_cast<ptrdiff_t>(r - first) * step, step);
                }
            }
        }
        for (int r = first, count = 0; groups > 1 && r < last; r += count) {
            count = rows_from(r);
            const float* y = accumulators + static_cast<ptrdiff_t>(r - first) * step;
            const Tile tile{reinterpret_cast<const int32_t*>(y), step, r, count, c0, cols};
            Sums of = layer.sums(0, nullptr);
            of.form = Sums::floats;
            epilogue(tile, of);
        }
    }
}

void ImageWorker::residual(const Linear& layer, const uint8_t* codes, int ld, const Windows& windows, int first, int last,
                           const Floats& factor, const Linear* next) {
    linear(layer, codes, ld, first, last, 0, 1, 0, layer.M, kResidual, next, [&](const Tile& tile, const Sums& sums) {
        by_run(windows, tile.row0, tile.row0 + tile.rows, [&](int row, int token, int count) {
            const Tile part{tile.sums + (row - tile.row0) * tile.ld, tile.ld, row, count, tile.col0, tile.cols};
            float* x = x_ + static_cast<ptrdiff_t>(token - row) * l_->ld_x;
            ops_.to_floats(part, sums, factor.data(), x, l_->ld_x, m_.shape.half, x, l_->ld_x);
        });
    });
}

void ImageWorker::norm(const NormConstants& of, const Linear& next, const Windows& windows, int first, int last) {
    by_run(windows, first, last, [&](int row, int token, int count) {
        ops_.norm_codes(of.view(), next.input.view(), x_ + static_cast<ptrdiff_t>(token) * l_->ld_x, l_->ld_x, row, count,
                        image_.codes.get() + static_cast<ptrdiff_t>(row) * l_->ld_c, l_->ld_c);
    });
}

// --- the graph ----------------------------------------------------------------------------------------------------------

void ImageWorker::patches(const uint8_t* pixels, const float* floats) {
    const Shape& s = m_.shape;
    const int ph = s.patch_height, pw = s.patch_width, K = s.patch_features(), ld_x = l_->ld_x;
    split(s_->tokens(), s_->tokens());
    const int first = std::max(row0_, s.prefix);
    for (int row = first; row < row1_; row++) {
        const int patch = row - s.prefix;
        const int top = patch / s.patch_columns() * ph, left = patch % s.patch_columns() * pw;
        uint8_t* to = image_.hidden.get() + static_cast<ptrdiff_t>(row) * l_->ld_hidden;
        for (int c = 0; c < s.channels; c++) {
            for (int y = 0; y < ph; y++, to += pw) {
                const ptrdiff_t from = (static_cast<ptrdiff_t>(c) * s.height + top + y) * s.width + left;
                if (floats) {
                    const size_t color = static_cast<size_t>(c);
                    ops_.pixel_codes(floats + from, pw, m_.pixel_std[color], m_.pixel_offset[color], m_.pixel_scale,
                                     static_cast<float>(m_.patch.input.high), to);
                } else if (m_.pixels_are_codes) {
                    std::memcpy(to, pixels + from, static_cast<size_t>(pw));
                } else {
                    for (int i = 0; i < pw; i++) {
                        to[i] = m_.pixel_table[static_cast<size_t>(c * 256 + pixels[from + i])];
                    }
                }
            }
        }
    }
    if (taps_ && first < row1_) {
        const ptrdiff_t at = static_cast<ptrdiff_t>(index_) * (s_->tokens() - s.prefix) - s.prefix + first;
        tap(m_.patch.input, image_.hidden.get(), l_->ld_hidden, first, row1_, K, taps_->patch + at * K);
    }
    tick(kPatches);
    const float* embed = m_.embed.empty() ? nullptr : m_.embed.data();
    for (int row = row0_; row < std::min(first, row1_); row++) {
        const ptrdiff_t at = static_cast<ptrdiff_t>(row) * ld_x;
        std::memcpy(x_ + at, embed + at, sizeof(float) * static_cast<size_t>(ld_x));
    }
    linear(m_.patch, image_.hidden.get(), l_->ld_hidden, first, row1_, 0, 1, 0, m_.patch.M, kPatches, &m_.stages[0].blocks[0].qkv,
           [&](const Tile& tile, const Sums& sums) { ops_.to_floats(tile, sums, nullptr, embed, ld_x, false, x_, ld_x); });
    float* own = x_ + static_cast<ptrdiff_t>(row0_) * ld_x;
    if (!m_.norm_pre.weight.empty() && row0_ < row1_) {
        ops_.layer_norm(m_.norm_pre.view(), own, ld_x, row1_ - row0_, own, ld_x);
    }
    if (s.half) {
        ops_.to_half(own, ld_x, row1_ - row0_, s_->dim);
    }
    tick(kPatches);
    if (s.windowed) {
        image_.barrier.wait();
        tick(kWait);
    }
}

// Enters the next stage: four neighbours of the map, column by column, become one token.
void ImageWorker::merge() {
    const float* before = x_;
    const ptrdiff_t ld = l_->ld_x, width = s_->map_width;
    const size_t C = static_cast<size_t>(s_->dim);
    enter(stage_ + 1);
    const Stage& stage = m_.stages[stage_];
    split(s_->tokens(), s_->tokens());
    uint8_t* codes = image_.hidden.get();
    float* merged = own_.merged.data();
    for (int row = row0_; row < row1_; row++) {
        const float* corner = before + (row / s_->map_width * 2 * width + row % s_->map_width * 2) * ld;
        const float* const neighbours[] = {corner, corner + width * ld, corner + ld, corner + (width + 1) * ld};
        for (size_t i = 0; i < 4; i++) {
            std::memcpy(merged + i * C, neighbours[i], sizeof(float) * C);
        }
        ops_.norm_codes(stage.merge_norm.view(), stage.merge.input.view(), merged, 0, row, 1,
                        codes + static_cast<ptrdiff_t>(row) * l_->ld_hidden, l_->ld_hidden);
    }
    if (taps_) {
        tap(stage.merge.input, codes, l_->ld_hidden, row0_, row1_, stage.merge.K,
            taps_->merges[stage_] + stage_row(row0_) * stage.merge.K);
    }
    tick(kMerge);
    linear(stage.merge, codes, l_->ld_hidden, row0_, row1_, 0, 1, 0, stage.merge.M, kMerge, &stage.blocks[0].qkv,
           [&](const Tile& tile, const Sums& sums) { ops_.to_floats(tile, sums, nullptr, nullptr, 0, m_.shape.half, x_, l_->ld_x); });
    image_.barrier.wait();
    tick(kWait);
}

void ImageWorker::block(size_t index) {
    const Stage& stage = m_.stages[stage_];
    const Block& b = stage.blocks[index];
    const Windows& windows = stage.windows[b.shifted];
    const Taps::OfBlock* taps = taps_ ? &taps_->stages[stage_][index] : nullptr;
    const bool final = index + 1 == stage.blocks.size();
    // After the last block only the pooled tokens count, so that only their queries, and what follows them, are computed.
    const bool only_pooled = final && stage_ + 1 == m_.stages.size() && !m_.shape.average && !taps_;
    const int end = only_pooled ? std::min(row1_, m_.shape.distilled ? 2 : 1) : row1_;
    const int side = m_.shape.windowed ? 0 : static_cast<int>(index % 2);
    // With windows of its own, a thread takes a few at a time through the block, whose codes then stay in its caches.
    const int group = whole_ ? l_->group : row1_ - row0_;
    const Linear* next = final ? nullptr : &stage.blocks[index + 1].qkv;
    int first = row0_;
    do {
        const int last = std::min(row1_, first + group);
        attention_inputs(b, windows, side, first, std::min(end, last), last, taps);
        if (!whole_) {
            image_.barrier.wait();
            tick(kWait);
        }
        attend(b, windows, side, first, std::min(end, last), taps ? taps->map : nullptr);
        if (taps) {
            tap(b.proj.input, image_.codes.get(), l_->ld_c, first, last, s_->dim, taps->proj + stage_row(first) * s_->dim);
        }
        tick(kAttention);
        residual(b.proj, image_.codes.get(), l_->ld_c, windows, first, std::min(end, last), b.ls1, &b.fc1);
        mlp(b, windows, first, std::min(end, last), last < row1_ ? &b.qkv : next, taps);
        first = last;
    } while (first < row1_);
    if (m_.shape.windowed) {  // the next block's windows, or what follows, hold rows of others
        image_.barrier.wait();
        tick(kWait);
    }
}

// Codes of q for rows [first, end), of k and v for [first, last).
void ImageWorker::attention_inputs(const Block& b, const Windows& windows, int side, int first, int end, int last,
                                   const Taps::OfBlock* taps) {
    uint8_t* codes = image_.codes.get();
    norm(b.norm1, b.qkv, windows, first, last);
    if (taps) {
        tap(b.qkv.input, codes, l_->ld_c, first, last, s_->dim, taps->qkv + stage_row(first) * s_->dim);
    }
    tick(kNorm);
    const int dim = s_->dim, width = s_->head_dim(), step = step_columns(b.qkv, width), tokens = s_->window();
    const auto split_heads = [&](const Tile& tile, const Sums& sums) {
        const int window = tile.row0 / tokens, row0 = tile.row0 - window * tokens;
        const HeadLayout heads = heads_of(b, window, side);
        Sums of = sums;
        of.row = of.row ? of.row + window * tokens : nullptr;
        // A step may hold heads of q and of k, or of k and of v.
        for (int c = 0; c < tile.cols;) {
            const int column = tile.col0 + c, which = column / dim;
            const int cols = std::min(tile.cols - c, (which + 1) * dim - column);
            const Tile part{tile.sums + c, tile.ld, row0, tile.rows, column, cols};
            ops_.to_head_codes(part, of, which, (column - which * dim) / width, b.heads[which].view(), heads);
            c += cols;
        }
    };
    // Steps of q alone may leave out the rows that nobody asks for.
    const int q_only = end < last ? dim / step * step : 0;
    linear(b.qkv, codes, l_->ld_c, first, end, tokens, width, 0, q_only, kHeads, nullptr, split_heads);
    linear(b.qkv, codes, l_->ld_c, first, last, tokens, width, q_only, b.qkv.M, kHeads, &b.proj, split_heads);
    if (taps) {
        tap_heads(b, side, first, last, *taps);
    }
    tick(kHeads);
}

HeadLayout ImageWorker::heads_of(const Block& b, int window, int side) {
    HeadLayout heads = b.attention.layout;
    heads.q = image_.q.get() + window * l_->q_window;
    heads.k = reinterpret_cast<int8_t*>(image_.k[side].get()) + window * l_->k_window;
    heads.v = reinterpret_cast<int8_t*>(image_.v[side].get()) + window * l_->v_window;
    return heads;
}

namespace {

// The biases [N][NP] of a head of windows, of its table [2 h - 1][2 w - 1]; may write some floats behind the last row.
void expand_bias(const float* table, int h, int w, int padded, float* out) {
    for (int n = 0; n < h * w; n++, out += padded) {
        for (int y = 0; y < h; y++) {
            const float* from = table + (n / w - y + h - 1) * (2 * w - 1) + w - 1 - n % w;
            for (int x = 0; x < w; x += 8) {  // eight at a time; what is too much is written over, or lies behind the tokens
                std::memcpy(out + y * w + x, from + x, 8 * sizeof(float));
            }
        }
    }
}

}  // namespace

void ImageWorker::attend(const Block& b, const Windows& windows, int side, int first, int last, int16_t* map) {
    if (first >= last) {
        return;
    }
    const int N = s_->window(), H = s_->heads;
    Attention a = b.attention;
    a.out = b.proj.input.view();
    for (int head = 0; head < H; head++) {
        if (windows) {
            const int distances = (2 * s_->window_height - 1) * (2 * s_->window_width - 1);
            expand_bias(b.position_bias.data() + static_cast<ptrdiff_t>(head) * distances, s_->window_height, s_->window_width,
                        l_->tokens_padded, own_.bias.data());
            a.bias = own_.bias.data();
        }
        for (int window = first / N; window * N < last; window++) {
            const int row0 = std::max(first - window * N, 0), row1 = std::min(last - window * N, N);
            a.layout = heads_of(b, window, side);
            if (windows && windows.mask[static_cast<size_t>(window)] >= 0) {
                a.mask = windows.masks.data() + static_cast<ptrdiff_t>(windows.mask[static_cast<size_t>(window)]) * kRegions *
                                                    l_->tokens_padded;
                a.region = windows.region.data() + static_cast<ptrdiff_t>(window) * N;
            } else {
                a.mask = nullptr;
            }
            uint8_t* to = image_.codes.get() + static_cast<ptrdiff_t>(window * N + row0) * l_->ld_c;
            ops_.attention(a, head, row0, row1 - row0, to, l_->ld_c, own_.attention.get(), map ? own_.map.get() : nullptr);
            if (map) {
                const ptrdiff_t at = ((static_cast<ptrdiff_t>(index_) * s_->windows() + window) * H + head) * N + row0;
                for (ptrdiff_t i = 0; i < static_cast<ptrdiff_t>(row1 - row0) * N; i++) {
                    map[at * N + i] = own_.map[static_cast<size_t>(i)];
                }
            }
        }
    }
}

void ImageWorker::mlp(const Block& b, const Windows& windows, int first, int last, const Linear* next, const Taps::OfBlock* taps) {
    uint8_t *codes = image_.codes.get(), *to = image_.hidden.get();
    const int ld = l_->ld_hidden;
    norm(b.norm2, b.fc1, windows, first, last);
    if (taps) {
        tap_tokens(b.fc1.input, codes, l_->ld_c, windows, first, last, s_->dim, taps->fc1);
    }
    tick(kNorm);
    const Quantize hidden = b.fc2.input.view();
    linear(b.fc1, codes, l_->ld_c, first, last, 0, 1, 0, b.fc1.M, kGelu, &b.fc2, [&](const Tile& tile, const Sums& sums) {
        if (b.gelu.count) {
            ops_.to_threshold_codes(tile, sums, b.gelu, to, ld);
        } else {
            ops_.to_gelu_codes(tile, sums, m_.shape.activation, hidden, b.gelu_margin, to, ld);
        }
    });
    if (taps) {
        tap_tokens(b.fc2.input, to, ld, windows, first, last, s_->hidden, taps->fc2);
    }
    residual(b.fc2, to, ld, windows, first, last, b.ls2, next);
}

void ImageWorker::outputs(float* logits) {
    float* x = x_;
    const int C = s_->dim, ld_x = l_->ld_x;
    split(s_->tokens(), s_->tokens());
    const bool leads = row0_ == 0 && row1_ > 0;
    if (m_.shape.average) {
        if (!m_.norm.weight.empty() && row0_ < row1_) {
            float* own = x + static_cast<ptrdiff_t>(row0_) * ld_x;
            ops_.layer_norm(m_.norm.view(), own, ld_x, row1_ - row0_, own, ld_x);
        }
        image_.barrier.wait();
        if (leads) {
            const int from = m_.shape.average_all ? 0 : m_.shape.prefix;
            for (int c = 0; c < C; c++) {
                double sum = 0.0;
                for (int r = from; r < s_->tokens(); r++) {
                    sum += static_cast<double>(x[static_cast<ptrdiff_t>(r) * ld_x + c]);
                }
                x[c] = static_cast<float>(sum / (s_->tokens() - from));
            }
        }
    } else if (leads && !m_.norm.weight.empty()) {
        ops_.layer_norm(m_.norm.view(), x, ld_x, m_.shape.distilled ? 2 : 1, x, ld_x);
    }
    if (!leads) {
        tick(kOutput);
        return;
    }
    for (size_t i = 0; i < m_.outputs.size(); i++) {
        const Linear& layer = m_.outputs[i];
        float* feature = x + static_cast<ptrdiff_t>(i) * ld_x;
        if (!m_.fc_norm.weight.empty()) {
            ops_.layer_norm(m_.fc_norm.view(), feature, ld_x, 1, feature, ld_x);
        }
        uint8_t* codes = image_.codes.get();
        ops_.codes(layer.input.view(), feature, ld_x, 0, 1, codes, l_->ld_c);
        if (taps_) {
            tap(layer.input, codes, l_->ld_c, 0, 1, C, taps_->outputs[i] + static_cast<ptrdiff_t>(index_) * C);
        }
        Floats& y = own_.logits;
        linear(layer, codes, l_->ld_c, 0, 1, 0, 1, 0, layer.M, kOutput, nullptr, [&](const Tile& tile, const Sums& sums) {
            ops_.to_floats(tile, sums, nullptr, nullptr, 0, false, y.data(), round_up(layer.M, kPad));
        });
        for (int c = 0; c < layer.M; c++) {
            logits[c] = i == 0 ? y[static_cast<size_t>(c)] : (logits[c] + y[static_cast<size_t>(c)]) / 2.0f;
        }
    }
    tick(kOutput);
}

// --- taps -----------------------------------------------------------------------------------------------------------------

void ImageWorker::tap(const InputCodes& input, const uint8_t* codes, int ld, int first, int last, int channels, int16_t* to) const {
    for (int r = first; r < last; r++) {
        for (int c = 0; c < channels; c++) {
            *to++ = static_cast<int16_t>(codes[static_cast<ptrdiff_t>(r) * ld + c] + input.low);
        }
    }
}

void ImageWorker::tap_tokens(const InputCodes& input, const uint8_t* codes, int ld, const Windows& windows, int first, int last,
                             int channels, int16_t* to) const {
    by_run(windows, first, last, [&](int row, int token, int count) {
        tap(input, codes, ld, row, row + count, channels, to + stage_row(token) * channels);
    });
}

void ImageWorker::tap_heads(const Block& b, int side, int first, int last, const Taps::OfBlock& to) {
    const int N = s_->window();
    for (int row = first; row < last; row++) {
        const HeadLayout h = heads_of(b, row / N, side);
        const ptrdiff_t D = h.head_dim, n = row % N;
        for (int head = 0; head < h.heads; head++) {
            const ptrdiff_t at = (((static_cast<ptrdiff_t>(index_) * s_->windows() + row / N) * h.heads + head) * N + n) * D;
            const uint8_t* q = h.q + (n * h.heads + head) * 4 * h.dim4;
            const int8_t* k = h.k + (static_cast<ptrdiff_t>(head) * h.dim4 * h.tokens_padded + n) * 4;
            const int8_t* v = h.v + (static_cast<ptrdiff_t>(head) * (h.tokens_padded / 4) + n / 4) * h.dim_padded * 4 + n % 4;
            for (ptrdiff_t d = 0; d < D; d++) {
                to.q[at + d] = static_cast<int16_t>(q[d] - b.heads[0].codes.stored_bias);
                to.k[at + d] = static_cast<int16_t>(k[d / 4 * 4 * h.tokens_padded + d % 4] - b.heads[1].codes.stored_bias);
                to.v[at + d] = static_cast<int16_t>(v[4 * d] - b.heads[2].codes.stored_bias);
            }
        }
    }
}

}  // namespace qvit::cpu
