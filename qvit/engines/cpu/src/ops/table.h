// The float operations between the integer products, one table of functions per instruction set.
//
// Every operation works on a few rows (tokens) of one image, so that a thread can carry its rows through the network, and
// is written once, as a template over a vector type of simd/ (`ops/*.h`). Vectors of constants are padded with zeros to a
// multiple of kPad floats past their end, so that whole vectors may be read; rows of floats are padded likewise.
//
// Codes are exact: LayerNorm, softmax, GELU and the standardisation of IRM are defined as the float32 nearest to the real value
// (the reference engine evaluates them in float64). The operations compute in float32 and look how far each result lies from the
// boundary between two codes; where that is within `margin`, more than their error, the code is computed again in float64.
//
// A code is stored unsigned: code - qn of its spec ("stored code"); engine.cpp folds what that adds into the sums' corrections.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qvit::cpu {

constexpr int kPad = 16;  // floats; the widest vector

enum class Activation : int { gelu, gelu_tanh, quick_gelu };

// How sums become pre-activations: y = (sum [doubled] + col[m] + row[r]) * (scale[m] * row_scale[r]) + bias[m].
struct Sums {
    enum Form : int {
        plain,    // y = sum * scale[m] + bias[m]
        general,  // the whole formula; col, row and row_scale may be null
        floats,   // the "sums" are floats, already scaled: y = sum + bias[m]
    };
    Form form;
    bool doubled;
    const float* scale;
    const float* bias;
    const int32_t* col;
    const int32_t* row;        // [token]
    const float* row_scale;    // [token]
};

// Sums of `rows` tokens from `row0` on and of `cols` channels from `col0` on: sums[r * ld + j].
struct Tile {
    const int32_t* sums;
    ptrdiff_t ld;
    int row0, rows, col0, cols;
};

// Stored codes of the input of a linear layer: clamp(round((x - offset) / scale), low, high) - low.
struct Quantize {
    int channels;
    const float* inverse;      // [channels] 1 / scale
    const float* scale;        // [channels]
    const float* offset;       // [channels]
    const float* row_inverse;  // [token] or null: 1 / scale where a token has its own (inverse and scale are 1 then)
    const float* row_scale;
    float low, high;
};

// LayerNorm; or with codes behind it: round(((x - mean) * rstd * gain[c] + shift[c]) * row_inverse[r]).
struct Norm {
    int channels;
    const float* gain;    // weight, divided by the step of the codes where there are any
    const float* shift;
    const float* weight;  // [channels] as they are in the model
    const float* bias;
    double eps;
    float margin;
};

// One of q, k, v: [rectify,] quantize, lay out for attention.
struct HeadCodes {
    bool rectify;
    double eps;
    const float* gain;         // [H][ld] of the standardised value: weight / scale; without rectify: 1 / scale
    const float* shift;        // [H][ld] (bias - offset) / scale
    const float* weight;       // [H][ld] as they are in the model, also the next two
    const float* bias;
    const float* offset;
    const float* scale;        // 1 where each token has its own
    const float* row_inverse;  // [H][N] or null
    const float* row_scale;    // [H][N]
    bool half_row;             // the offset is half of the token's own scale
    int ld;
    float low, high;
    int stored_bias;           // added to a code before it is stored
    float margin;
};

// Where codes of one image lie for attention. D4 = D / 4 rounded up, NP = tokens rounded up to 16, DP = D rounded up to 16.
//   q  uint8 [N][H][4 * D4]           stored codes, rows of the product with k
//   k  int8  [H][D4][NP][4]           four channels of a token together
//   v  int8  [H][NP / 4][DP][4]       four tokens of a channel together
struct HeadLayout {
    int heads, head_dim, tokens, tokens_padded, dim4, dim_padded;
    uint8_t* q;
    int8_t* k;
    int8_t* v;
    // Corrections of a column of scores: k_sum_factor * (sum of k's codes), and sum of q_offset[d] * code.
    int k_sum_factor;
    int k_code_bias;  // true code of k = stored byte + k_code_bias
    const float* q_offset;  // [H][DP] or null
};

constexpr float kMostScore = 60.0f;  // exp of it, 65,536 times, is a float32

struct Attention {
    HeadLayout layout;
    bool wide_q;          // q's stored codes take 8 bits
    bool wide_p;
    bool doubled;         // scores: 2 * sum + correction, with half the scale
    int row_bias;         // times the sum of q's stored codes, added to a row's sums (k's codes are stored with a bias)
    float factor;          // D^-0.5, of the float correction
    const float* q_scale;  // [H][N] scale_q * factor (half of it where doubled)
    const float* k_scale;  // [H][NP] scale_k
    bool k_uniform;        // k_scale has one value a head, and no float correction: the fast path
    bool bounded;          // and no score lies beyond +-kMostScore
    const float* p_scale;  // [H][N]
    float p_high;
    float margin;
    // out = (v_mul * sum + v_row * rowsum) * (p_scale * v_scale[d]) + rowsum * (p_scale * v_offset[d])
    int v_mul, v_row;
    const float* v_scale;   // [H][DP]
    const float* v_offset;  // [H][DP]
    Quantize out;           // of proj's input
    // Windows: what is added to the scores, each sum rounded. Null: nothing.
    const float* bias;      // [N][NP] of this head
    float most_bias;        // the largest magnitude
    const float* mask;      // [regions][NP] of this window, 0 or -100, the row being that of the query's region
    const uint8_t* region;  // [N] of this window
};

// GELU and codes as comparisons of whole numbers: the code of channel c is the number of `count` ascending thresholds that
// t = sum (doubled, plus col, plus row) exceeds, plus `below` more for thresholds that it falls short of: GELU dips below zero, so
// that far to the left codes rise again. int32 [channels / kPad][count + below][kPad]. count is 3, 7 or 15.
struct Thresholds {
    int count, below;
    const int32_t* values;
};
constexpr int kMostBelow = 3;

struct OpTable {
    const char* name;
    void (*layer_norm)(const Norm& norm, const float* x, ptrdiff_t ldx, int rows, float* y, ptrdiff_t ldy);
    // x: rows from token row0 on -> out [rows][ld_out] stored codes; bytes behind the channels are zeroed up to ld_out.
    void (*norm_codes)(const Norm& norm, const Quantize& q, const float* x, ptrdiff_t ldx, int row0, int rows, uint8_t* out,
                       ptrdiff_t ld_out);
    // Stored codes of pixels: clamp(round((x * std - offset) / scale), 0, high); divides, as the reference engine does.
    void (*pixel_codes)(const float* x, int n, float std, float offset, float scale, float high, uint8_t* out);
    void (*codes)(const Quantize& q, const float* x, ptrdiff_t ldx, int row0, int rows, uint8_t* out, ptrdiff_t ld_out);
    // Epilogues; `out` and `base` are those of the whole image: row = token.
    // out = base + factor * y; base or factor may be null (0 and 1). half: rounded to float16 once more.
    void (*to_floats)(const Tile& tile, const Sums& sums, const float* factor, const float* base, ptrdiff_t ld_base, bool half,
                      float* out, ptrdiff_t ld_out);
    // Rounds rows of floats to float16: nearest, ties to even, subnormal numbers kept, infinity where float16 ends.
    void (*to_half)(float* x, ptrdiff_t ldx, int rows, int channels);
    void (*to_gelu_codes)(const Tile& tile, const Sums& sums, Activation activation, const Quantize& q, float margin, uint8_t* out,
                          ptrdiff_t ld_out);
    void (*to_threshold_codes)(const Tile& tile, const Sums& sums, const Thresholds& thresholds, uint8_t* out, ptrdiff_t ld_out);
    // Fills thresholds[channels / kPad][count + kMostBelow][kPad], of which `below` (the return value) of the last are in use;
    // -1 where the codes are no such count. |t| <= reach.
    int (*find_thresholds)(const Sums& sums, Activation activation, const Quantize& q, float margin, int channels, int32_t reach,
                           int count, int32_t* thresholds);
    // which: 0 q, 1 k, 2 v; the tile begins and ends at heads; row0 and the buffers' rows are multiples of 4.
    void (*to_head_codes)(const Tile& tile, const Sums& sums, int which, int first_head, const HeadCodes& codes,
                          const HeadLayout& layout);
    // Adds float(sums) * scale[m] (* row_scale) to float accumulators [rows][ld] (groups of input channels).
    void (*accumulate)(const Tile& tile, const Sums& sums, float* out, ptrdiff_t ld_out);
    // Query rows of one head -> codes of proj's input, channels [head * D, head * D + D) of out. scratch: attention_scratch bytes.
    // map, if not null: uint8 [rows][tokens] codes of the softmax map.
    void (*attention)(const Attention& a, int head, int row0, int rows, uint8_t* out, ptrdiff_t ld_out, void* scratch,
                      uint8_t* map);
};

constexpr int kQueryRows = 12;  // rows that `attention` takes at once
inline size_t attention_scratch(int tokens_padded, int dim_padded) {
    return static_cast<size_t>(kQueryRows) * (5 * static_cast<size_t>(tokens_padded) + 4 * static_cast<size_t>(dim_padded) + 4) +
           12 * static_cast<size_t>(tokens_padded) + 256;
}

// Null where the build or the processor lacks them.
const OpTable* generic_ops();
const OpTable* avx2_ops();
const OpTable* avxvnni_ops();
const OpTable* avx512_ops();
const OpTable* neon_ops();

}  // namespace qvit::cpu
