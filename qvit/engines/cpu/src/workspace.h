// Memory of a call: what the threads of one image share, and what each has for itself. Kept between calls.
#pragma once

#include "engine.h"
#include "pool.h"

namespace qvit::cpu {

inline int round_up(int x, int step) { return (x + step - 1) / step * step; }

constexpr int kRowChunk = 24;     // rows between a GEMM and its epilogue: their sums stay in L1
constexpr int kRowAlign = 4;      // threads split windows between rows of such multiples: v is laid out by fours
constexpr int kMostChunk = kRowChunk + kRowAlign;  // of a window's last rows, so that none are left over

// Pitches of one stage, which all images share.
struct StageLayout {
    int ld_x;             // floats
    int ld_c, ld_hidden;  // codes of C channels; of the hidden layer, the patches or merged neighbours
    int ld_prepared;
    int tokens_padded, dim4, dim_padded;       // of a window, of a head
    ptrdiff_t q_window, k_window, v_window;    // bytes of a window
    int group;            // rows that a thread takes through a block at once: whole windows, as many as make weights pay
};

struct Layout {
    std::vector<StageLayout> stages;
    int rows;             // tokens of the first stage, rounded up: most of all
    int super_columns;    // most columns of one step of `linear`
    size_t panel_bytes;   // unpacked panels of one step
    bool groups;
    // Most of all stages: floats of the residual stream; bytes of codes; rows of the softmax map.
    size_t x[2], codes, hidden, prepared, q, k, v, map, bias;
    int most_merged;      // features of merged neighbours
    int tokens_padded, dim_padded;

    explicit Layout(const Model& model);
};

// Output channels of one step over a linear layer: whole panels, and whole units (heads).
int step_columns(const Linear& layer, int unit);

struct ImageSpace {
    Floats x[2];  // of even and odd stages; a ViT has one
    AlignedBytes codes, hidden, prepared, q;
    AlignedBytes k[2], v[2];  // of even and odd blocks: a fast thread may write the next block's while others still read
    Ints row_sums;
    Barrier barrier;

    ImageSpace(const Model& model, const Layout& layout);
};

struct ThreadSpace {
    AlignedBytes panels, sums, attention, map;
    Floats accumulators, logits, merged, bias;
    std::vector<const uint8_t*> unpacked;  // panels of one step
    Profile times{};

    ThreadSpace(const Model& model, const Layout& layout);
};

}  // namespace qvit::cpu
