// Runs a `Model` on images. Threads own rows (tokens) of an image through the whole network, so that one barrier a block, before
// attention reads the keys and values of the others, is all that they wait for. With windows, which move from block to block, the
// rows are owned for a block, and the barrier is behind it. Batches give each thread images of its own.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "model.h"

namespace qvit::cpu {

// Where the codes of all activation points of a batch go, for comparison with the reference engine; true codes, int16.
struct Taps {
    int16_t* patch = nullptr;               // [B, patches, K]
    struct OfBlock {
        // Inputs [B, tokens, K], those of qkv and proj in the order of the windows; q, k, v [B W, H, N, D]; map [B W, H, N, N].
        int16_t *qkv, *q, *k, *v, *map, *proj, *fc1, *fc2;
    };
    std::vector<std::vector<OfBlock>> stages;
    std::vector<int16_t*> merges;           // [B, tokens, 4 C] a stage; null for the first
    std::vector<int16_t*> outputs;          // [B, C] a head
};

// Phases of the profile. A thread's time between two stamps belongs to one of them.
enum Phase : int { kPatches, kMerge, kNorm, kPrepare, kUnpack, kGemm, kHeads, kAttention, kGelu, kResidual, kOutput, kWait, kPhases };
extern const char* const kPhaseNames[kPhases];
using Profile = std::array<double, kPhases>;  // seconds

struct ImageSpace;   // activations of one image
struct ThreadSpace;  // scratch of one thread
struct Layout;

class Engine {
   public:
    // threads: at most so many work on one call. profile: keep times (a few percent slower).
    Engine(Model model, int threads, bool profile);
    ~Engine();
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;

    const Model& model() const { return model_; }
    int threads() const { return threads_; }

    // pixels: uint8 [batch][C][H][W], or floats: normalised float32 of that shape; the other is null. logits: [batch][classes].
    // Reentrant. Throws std::bad_alloc.
    void run(const uint8_t* pixels, const float* floats, int batch, float* logits, const Taps* taps);

    // Seconds by phase since the last call, summed over threads.
    Profile take_profile();

   private:
    Model model_;
    std::unique_ptr<Layout> layout_;
    int threads_;
    bool profile_;
    Profile times_{};
    std::vector<std::unique_ptr<ImageSpace>> images_;
    std::vector<std::unique_ptr<ThreadSpace>> scratch_;
};

}  // namespace qvit::cpu
