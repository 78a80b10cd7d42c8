// Worker threads that all models of a process share.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace qvit::cpu {

// Calls prepare(count), then runs body(index, count) on the calling thread (index 0) and on up to threads - 1 workers at once,
// and returns when all are done. `count` is what was to be had: workers that serve another call are not waited for, so that
// concurrent calls do not oversubscribe the machine; bodies must do the whole work whatever count is. `body` must not throw.
//
// Workers spin for a moment after their work, then sleep. After a fork the child starts workers of its own.
void run_parallel(int threads, const std::function<void(int count)>& prepare,
                  const std::function<void(int index, int count)>& body);

// A barrier for the threads of one call: spins, then gives up its core.
class Barrier {
   public:
    void reset(int count) {
        count_ = count;
        arrived_.store(0, std::memory_order_relaxed);
    }
    void wait();

   private:
    int count_ = 1;
    std::atomic<int> arrived_{0};
    std::atomic<uint32_t> generation_{0};
};

// Held while a fork happens, so that no child inherits what it guards half-changed.
void lock_shared();
void unlock_shared();

}  // namespace qvit::cpu
