// Memory of a call: what the threads of one image share, and what each has for itself. Kept between calls.
#pragma once

#include "engine.h"
#include "pool.h"

namespace qvit::cpu {

inline int round_up(int x, int step) { return (x + step - 1) / step * step; }

constexpr int kRowChunk = 24;  // rows between a GEMM and its epilogue: their sums stay in L1
constexpr int kRowAlign = 4;   // threads split images between rows of such multiples: v is laid out by fours

// Pitches and sizes that all images of a model share.
struct Layout {
    int rows;             // tokens, rounded up
    int ld_x;             // floats
    int ld_c, ld_hidden;  // codes of C channels; of the hidden layer or the patches
    int ld_prepared;
    int tokens_padded, dim4, dim_padded;
    int super_columns;    // most columns of one step of `linear`
    size_t panel_bytes;   // unpacked panels of one step
    bool groups, prepare, row_sums;

    explicit Layout(const Model& model);
};

// Output channels of one step over a linear layer: whole panels, and whole units (heads).
int step_columns(const Linear& layer, int unit);

struct ImageSpace {
    Floats x;
    AlignedBytes codes, hidden, prepared, q;
    AlignedBytes k[2], v[2];  // of even and odd blocks: a fast thread may write the next block's while others still read
    Ints row_sums;
    Barrier barrier;

    ImageSpace(const Model& model, const Layout& layout);
};

struct ThreadSpace {
    AlignedBytes panels, sums, attention, map;
    Floats accumulators, logits;
    std::vector<const uint8_t*> unpacked;  // panels of one step
    Profile times{};

    ThreadSpace(const Model& model, const Layout& layout);
};

}  // namespace qvit::cpu
