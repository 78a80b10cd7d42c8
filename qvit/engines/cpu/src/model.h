// What the engine keeps of an integer model: packed weights, and constants in the form that the operations read.
#pragma once

#include <string>
#include <vector>

#include "gemm/gemm.h"
#include "ops/table.h"

namespace qvit::cpu {

// A vector of constants, 64-byte aligned, zeros for a whole vector behind its end; empty: absent (data() is null).
template <class T>
class Constants {
   public:
    Constants() = default;
    explicit Constants(size_t size) : bytes_(aligned_bytes((size + kPad) * sizeof(T))), size_(size) {}
    Constants(const T* from, size_t size) : Constants(size) {
        for (size_t i = 0; i < size; i++) {
            data()[i] = from[i];
        }
    }
    T* data() { return reinterpret_cast<T*>(bytes_.get()); }
    const T* data() const { return reinterpret_cast<const T*>(bytes_.get()); }
    size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    T& operator[](size_t i) { return data()[i]; }
    const T& operator[](size_t i) const { return data()[i]; }

   private:
    AlignedBytes bytes_;
    size_t size_ = 0;
};
using Floats = Constants<float>;
using Ints = Constants<int32_t>;

// Quantizer of a linear layer's input: `Quantize` with its storage.
struct InputCodes {
    int bits = 8, low = 0, high = 255;
    Floats inverse, scale, offset, row_inverse, row_scale;

    Quantize view() const;
};

struct NormConstants {
    Floats gain, shift, weight, bias;
    double eps = 0.0;
    float margin = 0.0f;

    Norm view() const {
        return {static_cast<int>(weight.size()), gain.data(), shift.data(), weight.data(), bias.data(), eps, margin};
    }
};

struct Linear {
    int M = 0, K = 0, bits = 0;
    int group = 0;                      // input channels of one part of the weight: K, or the size of a group
    const GemmKernel* kernel = nullptr;
    std::vector<PackedWeight> weights;  // one a group
    InputCodes input;
    bool doubled = false;     // the weight has a half-step offset: sums are doubled, scales halved
    bool row_sums = false;    // the sum of a token's codes enters
    Floats scale, bias;       // [groups][M], padded as a whole; [M]
    Ints col;                 // [groups][M] or empty

    int groups() const { return K / group; }
    Sums sums(int g, const int32_t* row) const;
};

struct HeadConstants {  // of q, k or v: `HeadCodes` with its storage
    HeadCodes codes{};
    Floats gain, shift, weight, bias, offset, scale, row_inverse, row_scale;

    HeadCodes view() const;
};

struct Block {
    NormConstants norm1, norm2;  // gain and shift have the step of the codes behind them in them
    Linear qkv, proj, fc1, fc2;
    Floats ls1, ls2;
    HeadConstants heads[3];
    float gelu_margin = 0.0f;
    Thresholds gelu{};           // count 0: GELU is computed
    Ints gelu_thresholds;
    Attention attention{};       // without layout.q, k, v, `out`, bias and mask, which the workspace, proj and windows give
    Floats q_scale, k_scale, p_scale, v_scale, v_offset, q_offset;
    bool shifted = false;        // which of its stage's windows it has
    // Relative position bias [H][2 wh - 1][2 ww - 1], the columns from the largest distance to the smallest: the biases of a
    // query then lie in the order of the keys. Empty where attention is not cut into windows.
    Floats position_bias;
};

// How the tokens of a map lie in windows. Rows of a block are in the order of the windows, one window behind the other.
struct Windows {
    Ints order;                   // [tokens] row -> token of the map; empty: the same
    std::vector<uint8_t> region;  // [tokens] of a row: rows of a window attend to each other within a region; empty: all do
    std::vector<int> mask;        // [windows] which of `masks` is the window's; -1: none
    Floats masks;                 // [..][kRegions][tokens of a window, padded]: what is added to scores of a region's query

    explicit operator bool() const { return !mask.empty(); }
};
constexpr int kRegions = 4;

struct StageShape {
    int map_height = 0, map_width = 0, window_height = 0, window_width = 0;  // in tokens; a ViT is one window of one row
    int dim = 0, depth = 0, heads = 0, hidden = 0;

    int tokens() const { return map_height * map_width; }
    int window() const { return window_height * window_width; }  // its tokens
    int windows() const { return tokens() / window(); }
    int head_dim() const { return dim / heads; }
};

// Blocks of one width, and what comes before them: four neighbours become one token.
struct Stage {
    StageShape shape;
    NormConstants merge_norm;  // over four times the width before; empty in the first stage
    Linear merge;
    Windows windows[2];        // as they are, and shifted
    std::vector<Block> blocks;
};

struct Shape {
    int prefix = 0, classes = 0;
    int channels = 0, height = 0, width = 0, patch_height = 0, patch_width = 0;
    Activation activation = Activation::gelu;
    bool average = false, average_all = false, distilled = false;
    bool half = false;      // the residual stream is rounded to float16 wherever it is written
    bool windowed = false;  // attention stays within windows: threads meet after every block

    int patch_features() const { return channels * patch_height * patch_width; }
    int patch_columns() const { return width / patch_width; }
};

struct Model {
    Shape shape;
    Isa isa = Isa::generic;
    const OpTable* ops = nullptr;
    Linear patch;
    std::vector<float> pixel_std;          // [channels]
    std::vector<float> pixel_offset;
    float pixel_scale = 1.0f;
    std::vector<uint8_t> pixel_table;      // [channels][256] codes of 8-bit pixels
    bool pixels_are_codes = false;         // pixel_table is the identity
    // [tokens][pitch]: prefix tokens as they enter the blocks; positions of the patches. Empty: neither.
    Floats embed;
    NormConstants norm_pre, norm, fc_norm; // empty: absent
    std::vector<Stage> stages;
    std::vector<Linear> outputs;
};

// Floats from one token's row to the next.
inline int row_pitch(const StageShape& shape) { return (shape.dim + kPad - 1) / kPad * kPad; }

// Constants of a linear layer as they come from the file.
struct LinearSource {
    int M, K, bits;
    const uint8_t* packed;       // dense stream of M * K codes
    size_t packed_size;
    const float* scale;          // [groups][M]: scale_w * scale_x (without scale_x where a token has its own)
    const double* value_scale;   // [groups][M]: scale_w
    int groups;
    bool half_step;              // value = scale * (code + 1/2)
    const float* bias;           // [M] or null
    int x_bits, x_low, x_high;
    const float *x_scale, *x_offset;  // [K]; the offset may be null
    const float* x_row_scale;         // [tokens] or null
    int tokens;
};
void build_linear(const LinearSource& source, Isa isa, Linear& out);

// The windows of a stage, shifted down and right by so many tokens.
Windows build_windows(const StageShape& shape, int down, int right);

// Replaces GELU by thresholds where a block's codes of fc2's input have at most 4 bits and allow it.
void build_thresholds(const OpTable& ops, Activation activation, Block& block);

// The path called `name` (avx512vnni, avx2, generic, neon), or the best where it is empty. Throws std::invalid_argument.
Isa choose_isa(const std::string& name);
const OpTable& ops_of(Isa isa);
const char* name_of(Isa isa);
std::string isa_names();  // those that run here

}  // namespace qvit::cpu
