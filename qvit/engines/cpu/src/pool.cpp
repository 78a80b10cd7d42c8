#include "pool.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define QVIT_HAS_FORK 1
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qvit::cpu {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kIdleSpin = std::chrono::microseconds(300);  // an idle worker, before it sleeps
constexpr auto kWaitSpin = std::chrono::microseconds(30);   // who waits for others, before it offers its core to them
constexpr int kLooks = 64;  // between two looks at the clock

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until done() holds or the time is over; whether it holds.
template <class Done>
bool spin_until(const Done& done, std::chrono::microseconds time) {
    const auto end = Clock::now() + time;
    do {
        for (int i = 0; i < kLooks; i++) {
            if (done()) {
                return true;
            }
            pause();
        }
    } while (Clock::now() < end);
    return done();
}

template <class Done>
void wait_until(const Done& done) {
    if (!spin_until(done, kWaitSpin)) {
        while (!done()) {
            std::this_thread::yield();
        }
    }
}

struct Job {
    const std::function<void(int, int)>* body;
    int count;
    std::atomic<int> left;
};

class Worker {
   public:
    void give(Job* job, int index) {
        index_ = index;
        {
            // Under the lock, so that a worker between its last look and its sleep does not miss it.
            const std::lock_guard<std::mutex> lock(mutex_);
            job_.store(job, std::memory_order_release);
        }
        wake_.notify_one();
    }

    Job* take(int& index) {
        const auto ready = [this] { return job_.load(std::memory_order_acquire) != nullptr; };
        if (!spin_until(ready, kIdleSpin)) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, ready);
        }
        index = index_;
        return job_.exchange(nullptr, std::memory_order_acq_rel);
    }

   private:
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<Job*> job_{nullptr};
    int index_ = 0;
};

class Pool {
   public:
    void run(int threads, const std::function<void(int)>& prepare, const std::function<void(int, int)>& body) {
        std::vector<Worker*> mine;
        if (threads > 1) {
            const std::lock_guard<std::mutex> lock(mutex_);
            start(threads - 1);
            while (static_cast<int>(mine.size()) < threads - 1 && !idle_.empty()) {
                mine.push_back(idle_.back());
                idle_.pop_back();
            }
        }
        Job job{&body, static_cast<int>(mine.size()) + 1, {static_cast<int>(mine.size())}};
        prepare(job.count);
        for (size_t i = 0; i < mine.size(); i++) {
            mine[i]->give(&job, static_cast<int>(i) + 1);
        }
        body(0, job.count);
        wait_until([&job] { return job.left.load(std::memory_order_acquire) == 0; });
    }

   private:
    void start(int workers) {
        while (started_ < workers) {
            auto* worker = new Worker;
            try {
                std::thread([this, worker] { work(worker); }).detach();
            } catch (const std::system_error&) {  // no more threads to be had: fewer do the work
                delete worker;
                return;
            }
            started_++;
            idle_.push_back(worker);
        }
    }

    void work(Worker* worker) {
        for (;;) {
            int index = 0;
            Job* job = worker->take(index);
            (*job->body)(index, job->count);
            {
                // Idle again before the call can return, so that the next call finds this worker.
                const std::lock_guard<std::mutex> lock(mutex_);
                idle_.push_back(worker);
            }
            job->left.fetch_sub(1, std::memory_order_acq_rel);
        }
    }

    std::mutex mutex_;
    std::vector<Worker*> idle_;
    int started_ = 0;
};

std::mutex& shared_mutex() {
    static auto* mutex = new std::mutex;
    return *mutex;
}

// Never destroyed: its workers are detached and may outlive static objects. A forked child, where they do not exist, leaves
// the parent's pool alone and makes its own.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
    Pool* pool = the_pool.load(std::memory_order_acquire);
    if (pool == nullptr) {
        auto* fresh = new Pool;
        if (the_pool.compare_exchange_strong(pool, fresh, std::memory_order_acq_rel)) {
            pool = fresh;
        } else {
            delete fresh;
        }
    }
    return *pool;
}

}  // namespace

void lock_shared() { shared_mutex().lock(); }
void unlock_shared() { shared_mutex().unlock(); }

#ifdef QVIT_HAS_FORK
namespace {
const int kForkHandlers = pthread_atfork(lock_shared, unlock_shared, [] {
    the_pool.store(nullptr, std::memory_order_release);
    unlock_shared();
});
}  // namespace
#endif

void run_parallel(int threads, const std::function<void(int)>& prepare, const std::function<void(int, int)>& body) {
    pool().run(threads, prepare, body);
}

void Barrier::wait() {
    if (count_ == 1) {
        return;
    }
    const uint32_t generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
        arrived_.store(0, std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_release);
        return;
    }
    wait_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
}

}  // namespace qvit::cpu
