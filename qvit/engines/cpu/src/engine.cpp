#include "engine.h"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "image_worker.h"

namespace qvit::cpu {

const char* const kPhaseNames[kPhases] = {"patch embedding", "patch merging", "norm and codes", "prepare codes", "unpack weights",
                                          "integer products", "rectify and codes", "attention", "gelu and codes",
                                          "residual", "heads", "waiting"};

namespace {

struct SharedLock {
    SharedLock() { lock_shared(); }
    ~SharedLock() { unlock_shared(); }
    SharedLock(const SharedLock&) = delete;
    SharedLock& operator=(const SharedLock&) = delete;
};

template <class Space>
std::unique_ptr<Space> take(std::vector<std::unique_ptr<Space>>& from) {
    const SharedLock lock;
    if (from.empty()) {
        return nullptr;
    }
    std::unique_ptr<Space> space = std::move(from.back());
    from.pop_back();
    return space;
}

}  // namespace

Engine::Engine(Model model, int threads, bool profile)
    : model_(std::move(model)), layout_(std::make_unique<Layout>(model_)), threads_(std::max(1, threads)), profile_(profile) {}

Engine::~Engine() = default;

void Engine::run(const uint8_t* pixels, const float* floats, int batch, float* logits, const Taps* taps) {
    if (batch <= 0) {
        return;
    }
    const Shape& s = model_.shape;
    const ptrdiff_t size = static_cast<ptrdiff_t>(s.channels) * s.height * s.width;
    const int most = std::min(threads_, std::max(1, layout_->rows / kRowAlign) * batch);
    // All memory is there before threads start, which may not throw.
    std::vector<std::unique_ptr<ImageSpace>> images;
    std::vector<std::unique_ptr<ThreadSpace>> own;
    while (static_cast<int>(own.size()) < most) {
        auto space = take(scratch_);
        own.push_back(space ? std::move(space) : std::make_unique<ThreadSpace>(model_, *layout_));
        auto image = static_cast<int>(images.size()) < std::min(most, batch) ? take(images_) : nullptr;
        if (image) {
            images.push_back(std::move(image));
        } else if (static_cast<int>(images.size()) < std::min(most, batch)) {
            images.push_back(std::make_unique<ImageSpace>(model_, *layout_));
        }
    }
    std::atomic<int> next{0};
    const auto one = [&](int image, int space, int thread, int part, int parts) {
        ImageWorker worker(model_, *layout_, *images[static_cast<size_t>(space)], *own[static_cast<size_t>(thread)], profile_, taps,
                           image, part, parts);
        worker.run(pixels ? pixels + image * size : nullptr, floats ? floats + image * size : nullptr,
                   logits + static_cast<ptrdiff_t>(image) * s.classes);
    };
    const auto singly = [&](int until, int index) {
        for (int image = next.fetch_add(1); image < until; image = next.fetch_add(1)) {
            one(image, index, index, 0, 1);
        }
    };
    // As many images as there are threads at a time: each thread takes the next one.
    const int whole = batch / most * most, rest = batch - whole;
    for (auto& image : images) {
        image->barrier.reset(1);
    }
    if (whole) {
        run_parallel(most, [](int) {}, [&](int index, int) { singly(whole, index); });
        next.store(whole);
    }
    // The images that are left are shared by `team` threads each.
    int team = 0;
    const auto form_teams = [&](int count) {
        team = count / rest;
        for (int i = 0; i < rest && team; i++) {
            images[static_cast<size_t>(i)]->barrier.reset(team);
        }
    };
    if (rest) {
        run_parallel(most, form_teams, [&](int index, int) {
            if (team == 0) {
                singly(batch, index);
            } else if (index < rest * team) {
                one(whole + index / team, index / team, index, index % team, team);
            }
        });
    }
    const SharedLock lock;
    for (auto& image : images) {
        images_.push_back(std::move(image));
    }
    for (auto& space : own) {
        for (int i = 0; i < kPhases; i++) {
            times_[static_cast<size_t>(i)] += space->times[static_cast<size_t>(i)];
        }
        space->times = {};
        scratch_.push_back(std::move(space));
    }
}

Profile Engine::take_profile() {
    const SharedLock lock;
    const Profile times = times_;
    times_ = {};
    return times;
}

}  // namespace qvit::cpu
