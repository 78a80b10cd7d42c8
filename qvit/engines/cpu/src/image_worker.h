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
    void patches(const uint8_t* pixels, const float* floats);
    void block(int index);
    void attend(const Block& block, int index, int last);
    void outputs(float* logits);

    // The product of a layer with rows [first, last) of `codes` (row = token), for output channels [from, to), which begin and
    // end at multiples of `unit`, and `epilogue(tile, sums)` on each tile. next: the layer after it, to be fetched, or null.
    template <class Epilogue>
    void linear(const Linear& layer, const uint8_t* codes, int ld, int first, int last, int unit, int from, int to, Phase phase,
                const Linear* next, const Epilogue& epilogue);
    const uint8_t* prepared(const Linear& layer, int g, const uint8_t* codes, int ld, int first, int last, int& pitch);
    void residual(const Linear& layer, const uint8_t* codes, int ld, int last, const Floats& factor,
                  const Linear* next);

    void tap(const InputCodes& input, const uint8_t* codes, int ld, int first, int last, int channels, int16_t* to) const;
    void tap_heads(const Block& block, const HeadLayout& layout, const Taps::OfBlock& to) const;
    void tick(Phase phase) {
        if (profile_) {
            const double now = clock_seconds();
            own_.times[phase] += now - since_;
            since_ = now;
        }
    }

    const Model& m_;
    const Shape& s_;
    const OpTable& ops_;
    const Layout& l_;
    ImageSpace& image_;
    ThreadSpace& own_;
    const bool profile_;
    const Taps* taps_;
    const int index_;  // of the image in the batch
    const int parts_;
    int row0_, row1_;
    double since_ = 0.0;
};

}  // namespace qvit::cpu
