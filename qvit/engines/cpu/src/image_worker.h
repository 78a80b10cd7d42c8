// One thread's part of one image: rows [row0, row1) through the whole network.
#pragma once

#include <chrono>

#include "workspace.h"

namespace qvit::cpu {

inline double clock_seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

class ImageWorker {
   public:
    ImageWorker(const Model& model, const Layout& layout, ImageSpace& image, ThreadSpace& own, bool profile, const Taps* taps,
                int index, int part, int parts);

    // pixels or floats: of this image.
    void run(const uint8_t* pixels, const float* floats, float* logits);

   private:
    void enter(size_t stage);
    void patches(const uint8_t* pixels, const float* floats);
    void merge();
    void block(size_t index);
    void attention_inputs(const Block& block, const Windows& windows, int side, int first, int end, int last,
                          const Taps::OfBlock* taps);
    void attend(const Block& block, const Windows& windows, int side, int first, int last, int16_t* map);
    void mlp(const Block& block, const Windows& windows, int first, int last, const Linear* next, const Taps::OfBlock* taps);
    void outputs(float* logits);

    // Rows are numbered as a block sees them: window by window. Splits `tokens` rows, windows of `window` rows each, among the
    // threads, between whole windows where that comes out even, else within them.
    void split(int tokens, int window);
    ptrdiff_t stage_row(int row) const { return static_cast<ptrdiff_t>(index_) * s_->tokens() + row; }
    // Calls f(row, token, count) for rows [first, last) that are consecutive tokens of the map.
    template <class Function>
    void by_run(const Windows& windows, int first, int last, const Function& f) const;

    // The product of a layer with rows [first, last) of `codes`, for output channels [from, to), which begin and end at multiples
    // of `unit`, and `epilogue(tile, sums)` on each tile. window: a tile holds rows of one window of so many, from a multiple of
    // kRowAlign on; 0: any. next: the layer after it, to be fetched, or null.
    template <class Epilogue>
    void linear(const Linear& layer, const uint8_t* codes, int ld, int first, int last, int window, int unit, int from, int to,
                Phase phase, const Linear* next, const Epilogue& epilogue);
    const uint8_t* prepared(const Linear& layer, int g, const uint8_t* codes, int ld, int first, int last, int& pitch);
    void norm(const NormConstants& of, const Linear& next, const Windows& windows, int first, int last);
    void residual(const Linear& layer, const uint8_t* codes, int ld, const Windows& windows, int first, int last,
                  const Floats& factor, const Linear* next);
    HeadLayout heads_of(const Block& block, int window, int side);

    void tap(const InputCodes& input, const uint8_t* codes, int ld, int first, int last, int channels, int16_t* to) const;
    void tap_tokens(const InputCodes& input, const uint8_t* codes, int ld, const Windows& windows, int first, int last,
                    int channels, int16_t* to) const;
    void tap_heads(const Block& block, int side, int first, int last, const Taps::OfBlock& to);
    void tick(Phase phase) {
        if (profile_) {
            const double now = clock_seconds();
            own_.times[phase] += now - since_;
            since_ = now;
        }
    }

    const Model& m_;
    const Layout& layout_;
    const OpTable& ops_;
    ImageSpace& image_;
    ThreadSpace& own_;
    const bool profile_;
    const Taps* taps_;
    const int index_;  // of the image in the batch
    const int part_, parts_;
    // Of the stage that runs.
    size_t stage_ = 0;
    const StageShape* s_ = nullptr;
    const StageLayout* l_ = nullptr;
    float* x_ = nullptr;
    int row0_ = 0, row1_ = 0;
    bool whole_ = true;  // no window is shared with another thread
    double since_ = 0.0;
};

}  // namespace qvit::cpu
