#include "image_worker.h"

#include <algorithm>
#include <cstring>

namespace qvit::cpu {

ImageWorker::ImageWorker(const Model& model, const Layout& layout, ImageSpace& image, ThreadSpace& own, bool profile,
                         const Taps* taps, int index, int part, int parts)
    : m_(model), s_(model.shape), ops_(*model.ops), l_(layout), image_(image), own_(own), profile_(profile), taps_(taps),
      index_(index), parts_(parts) {
    const int steps = layout.rows / kRowAlign;
    row0_ = std::min(s_.tokens, steps * part / parts * kRowAlign);
    row1_ = std::min(s_.tokens, steps * (part + 1) / parts * kRowAlign);
    if (profile) {
        since_ = clock_seconds();
    }
}

void ImageWorker::run(const uint8_t* pixels, const float* floats, float* logits) {
    patches(pixels, floats);
    for (int i = 0; i < s_.depth; i++) {
        block(i);
    }
    outputs(logits);
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
        uint8_t* out = image_.prepared.get() + static_cast<ptrdiff_t>(first) * l_.ld_prepared;
        layer.kernel->prepare(rows, ld, last - first, layer.group, out, pitch);
        rows = out;
    }
    return rows;
}

template <class Epilogue>
void ImageWorker::linear(const Linear& layer, const uint8_t* codes, int ld, int first, int last, int unit, int from, int to,
                         Phase phase, const Linear* next, const Epilogue& epilogue) {
    if (first >= last) {
        return;
    }
    const GemmKernel& kernel = *layer.kernel;
    const int step = step_columns(layer, unit), panel = kernel.panel;
    const size_t panel_bytes = kernel.scratch_bytes(layer.group);
    const int groups = layer.groups();
    auto& unpacked = own_.unpacked;
    int32_t* sums = reinterpret_cast<int32_t*>(own_.sums.get());
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
            for (int r = first; r < last; r += kRowChunk) {
                const int count = std::min(kRowChunk, last - r);
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
        for (int r = first; groups > 1 && r < last; r += kRowChunk) {
            const float* y = accumulators + static_cast<ptrdiff_t>(r - first) * step;
            const Tile tile{reinterpret_cast<const int32_t*>(y), step, r, std::min(kRowChunk, last - r), c0, cols};
            Sums of = layer.sums(0, nullptr);
            of.form = Sums::floats;
            epilogue(tile, of);
        }
    }
}

void ImageWorker::residual(const Linear& layer, const uint8_t* codes, int ld, int last, const Floats& factor, const Linear* next) {
    float* x = image_.x.data();
    linear(layer, codes, ld, row0_, last, 1, 0, layer.M, kResidual, next, [&](const Tile& tile, const Sums& sums) {
        ops_.to_floats(tile, sums, factor.data(), x, l_.ld_x, x, l_.ld_x);
    });
}

// --- the graph ----------------------------------------------------------------------------------------------------------

void ImageWorker::patches(const uint8_t* pixels, const float* floats) {
    const int ph = s_.patch_height, pw = s_.patch_width, K = s_.patch_features();
    const int first = std::max(row0_, s_.prefix);
    for (int row = first; row < row1_; row++) {
        const int patch = row - s_.prefix;
        const int top = patch / s_.patch_columns() * ph, left = patch % s_.patch_columns() * pw;
        uint8_t* to = image_.hidden.get() + static_cast<ptrdiff_t>(row) * l_.ld_hidden;
        for (int c = 0; c < s_.channels; c++) {
            for (int y = 0; y < ph; y++, to += pw) {
                const ptrdiff_t from = (static_cast<ptrdiff_t>(c) * s_.height + top + y) * s_.width + left;
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
        const ptrdiff_t at = static_cast<ptrdiff_t>(index_) * (s_.tokens - s_.prefix) - s_.prefix + first;
        tap(m_.patch.input, image_.hidden.get(), l_.ld_hidden, first, row1_, K, taps_->patch + at * K);
    }
    tick(kPatches);
    float* x = image_.x.data();
    for (int row = row0_; row < std::min(first, row1_); row++) {
        const ptrdiff_t at = static_cast<ptrdiff_t>(row) * l_.ld_x;
        std::memcpy(x + at, m_.embed.data() + at, sizeof(float) * static_cast<size_t>(l_.ld_x));
    }
    const Linear* next = s_.depth ? &m_.blocks[0].qkv : nullptr;
    linear(m_.patch, image_.hidden.get(), l_.ld_hidden, first, row1_, 1, 0, m_.patch.M, kPatches, next,
           [&](const Tile& tile, const Sums& sums) {
               ops_.to_floats(tile, sums, nullptr, m_.embed.data(), l_.ld_x, x, l_.ld_x);
           });
    if (!m_.norm_pre.weight.empty() && row0_ < row1_) {
        float* own = x + static_cast<ptrdiff_t>(row0_) * l_.ld_x;
        ops_.layer_norm(m_.norm_pre.view(), own, l_.ld_x, row1_ - row0_, own, l_.ld_x);
    }
    tick(kPatches);
}

void ImageWorker::block(int index) {
    const Block& b = m_.blocks[static_cast<size_t>(index)];
    const Taps::OfBlock* taps = taps_ ? &taps_->blocks[static_cast<size_t>(index)] : nullptr;
    float* x = image_.x.data();
    uint8_t* codes = image_.codes.get();
    // After the last block only the pooled tokens count, so that only their queries, and what follows them, are computed.
    const bool only_pooled = index + 1 == s_.depth && !s_.average && !taps_;
    const int last = only_pooled ? std::min(row1_, s_.distilled ? 2 : 1) : row1_;
    const auto norm = [&](const NormConstants& of, const Linear& next, int end, int16_t* to) {
        if (row0_ < end) {
            ops_.norm_codes(of.view(), next.input.view(), x + static_cast<ptrdiff_t>(row0_) * l_.ld_x, l_.ld_x, row0_, end - row0_,
                            codes + static_cast<ptrdiff_t>(row0_) * l_.ld_c, l_.ld_c);
        }
        if (to) {
            tap(next.input, codes, l_.ld_c, row0_, end, s_.dim, to + (static_cast<ptrdiff_t>(index_) * s_.tokens + row0_) * s_.dim);
        }
        tick(kNorm);
    };

    norm(b.norm1, b.qkv, row1_, taps ? taps->qkv : nullptr);
    const int side = index % 2;
    HeadLayout heads = b.attention.layout;
    heads.q = image_.q.get();
    heads.k = reinterpret_cast<int8_t*>(image_.k[side].get());
    heads.v = reinterpret_cast<int8_t*>(image_.v[side].get());
    const int width = s_.head_dim(), step = step_columns(b.qkv, width);
    const auto split = [&](const Tile& tile, const Sums& sums) {
        // A step may hold heads of q and of k, or of k and of v.
        for (int c = 0; c < tile.cols;) {
            const int column = tile.col0 + c, which = column / s_.dim;
            const int cols = std::min(tile.cols - c, (which + 1) * s_.dim - column);
            const Tile part{tile.sums + c, tile.ld, tile.row0, tile.rows, column, cols};
            ops_.to_head_codes(part, sums, which, (column - which * s_.dim) / width, b.heads[which].view(), heads);
            c += cols;
        }
    };
    // Steps of q alone may leave out the rows that nobody asks for.
    const int q_only = last < row1_ ? s_.dim / step * step : 0;
    linear(b.qkv, codes, l_.ld_c, row0_, last, width, 0, q_only, kHeads, nullptr, split);
    linear(b.qkv, codes, l_.ld_c, row0_, row1_, width, q_only, b.qkv.M, kHeads, &b.proj, split);
    if (taps) {
        tap_heads(b, heads, *taps);
    }
    tick(kHeads);
    image_.barrier.wait();
    tick(kWait);

    attend(b, index, last);
    if (taps) {
        int16_t* to = taps->proj + (static_cast<ptrdiff_t>(index_) * s_.tokens + row0_) * s_.dim;
        tap(b.proj.input, codes, l_.ld_c, row0_, last, s_.dim, to);
    }
    tick(kAttention);
    residual(b.proj, codes, l_.ld_c, last, b.ls1, &b.fc1);

    norm(b.norm2, b.fc1, last, taps ? taps->fc1 : nullptr);
    const Quantize hidden = b.fc2.input.view();
    linear(b.fc1, codes, l_.ld_c, row0_, last, 1, 0, b.fc1.M, kGelu, &b.fc2, [&](const Tile& tile, const Sums& sums) {
        if (b.gelu.count) {
            ops_.to_threshold_codes(tile, sums, b.gelu, image_.hidden.get(), l_.ld_hidden);
        } else {
            ops_.to_gelu_codes(tile, sums, s_.activation, hidden, b.gelu_margin, image_.hidden.get(), l_.ld_hidden);
        }
    });
    if (taps) {
        tap(b.fc2.input, image_.hidden.get(), l_.ld_hidden, row0_, last, s_.hidden,
            taps->fc2 + (static_cast<ptrdiff_t>(index_) * s_.tokens + row0_) * s_.hidden);
    }
    const Linear* after = index + 1 < s_.depth ? &m_.blocks[static_cast<size_t>(index) + 1].qkv : nullptr;
    residual(b.fc2, image_.hidden.get(), l_.ld_hidden, last, b.ls2, after);
}

void ImageWorker::attend(const Block& b, int index, int last) {
    if (row0_ >= last) {
        return;
    }
    Attention a = b.attention;
    const int side = index % 2;
    a.layout.q = image_.q.get();
    a.layout.k = reinterpret_cast<int8_t*>(image_.k[side].get());
    a.layout.v = reinterpret_cast<int8_t*>(image_.v[side].get());
    a.out = b.proj.input.view();
    uint8_t* to = image_.codes.get() + static_cast<ptrdiff_t>(row0_) * l_.ld_c;
    for (int head = 0; head < s_.heads; head++) {
        ops_.attention(a, head, row0_, last - row0_, to, l_.ld_c, own_.attention.get(), taps_ ? own_.map.get() : nullptr);
        if (taps_) {
            const ptrdiff_t n = s_.tokens, at = (static_cast<ptrdiff_t>(index_) * s_.heads + head) * n + row0_;
            int16_t* map = taps_->blocks[static_cast<size_t>(index)].map + at * n;
            for (ptrdiff_t i = 0; i < (last - row0_) * n; i++) {
                map[i] = own_.map[static_cast<size_t>(i)];
            }
        }
    }
}

void ImageWorker::outputs(float* logits) {
    float* x = image_.x.data();
    const int C = s_.dim;
    const bool leads = row0_ == 0 && row1_ > 0;
    if (s_.average) {
        if (!m_.norm.weight.empty() && row0_ < row1_) {
            float* own = x + static_cast<ptrdiff_t>(row0_) * l_.ld_x;
            ops_.layer_norm(m_.norm.view(), own, l_.ld_x, row1_ - row0_, own, l_.ld_x);
        }
        image_.barrier.wait();
        if (leads) {
            const int from = s_.average_all ? 0 : s_.prefix;
            for (int c = 0; c < C; c++) {
                double sum = 0.0;
                for (int r = from; r < s_.tokens; r++) {
                    sum += static_cast<double>(x[static_cast<ptrdiff_t>(r) * l_.ld_x + c]);
                }
                x[c] = static_cast<float>(sum / (s_.tokens - from));
            }
        }
    } else if (leads && !m_.norm.weight.empty()) {
        ops_.layer_norm(m_.norm.view(), x, l_.ld_x, s_.distilled ? 2 : 1, x, l_.ld_x);
    }
    if (!leads) {
        tick(kOutput);
        return;
    }
    for (size_t i = 0; i < m_.outputs.size(); i++) {
        const Linear& layer = m_.outputs[i];
        float* feature = x + static_cast<ptrdiff_t>(i) * l_.ld_x;
        if (!m_.fc_norm.weight.empty()) {
            ops_.layer_norm(m_.fc_norm.view(), feature, l_.ld_x, 1, feature, l_.ld_x);
        }
        uint8_t* codes = image_.codes.get();
        ops_.codes(layer.input.view(), feature, l_.ld_x, 0, 1, codes, l_.ld_c);
        if (taps_) {
            tap(layer.input, codes, l_.ld_c, 0, 1, C, taps_->outputs[i] + static_cast<ptrdiff_t>(index_) * C);
        }
        Floats& y = own_.logits;
        linear(layer, codes, l_.ld_c, 0, 1, 1, 0, layer.M, kOutput, nullptr, [&](const Tile& tile, const Sums& sums) {
            ops_.to_floats(tile, sums, nullptr, nullptr, 0, y.data(), round_up(layer.M, kPad));
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

void ImageWorker::tap_heads(const Block& b, const HeadLayout& h, const Taps::OfBlock& to) const {
    const ptrdiff_t D = h.head_dim, N = h.tokens;
    for (int head = 0; head < h.heads; head++) {
        for (int n = row0_; n < row1_; n++) {
            const ptrdiff_t at = ((static_cast<ptrdiff_t>(index_) * h.heads + head) * N + n) * D;
            const uint8_t* q = h.q + (static_cast<ptrdiff_t>(n) * h.heads + head) * 4 * h.dim4;
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
