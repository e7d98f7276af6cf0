// Threads that work beside the caller. A C ABI.
//
// Decides: who does which part of the work. A job is a number of steps, and a step is chunks that do not depend on each other.
// Nobody begins a step before all chunks of those before it are done. So a whole token is one job, and its helpers are woken once.
//
// Chunks are claimed one by one, by the caller like by everyone else. Who waits for the end of a step waits for chunks that
// somebody claimed, never for a thread: one that the system has not woken yet, or has put aside, has claimed nothing, and the
// others do its part. Each thread begins a step with a part of its own, so that it reads on where it has read.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace {

inline void breathe() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}
using Microseconds = std::chrono::microseconds;
constexpr Microseconds BETWEEN_JOBS{20};  // of spinning: less than waking a thread takes
#ifndef BETWEEN_STEPS_US
#define BETWEEN_STEPS_US 50
#endif
constexpr Microseconds BETWEEN_STEPS{BETWEEN_STEPS_US};  // longer: more work is certain to come

template <class F> bool spin_until(Microseconds most, F&& f) {
    for (int i = 0; i < 64; i++) {
        if (f()) return true;
        breathe();
    }
    const auto until = std::chrono::steady_clock::now() + most;
    do {
        for (int i = 0; i < 64; i++) {
            if (f()) return true;
            breathe();
        }
    } while (std::chrono::steady_clock::now() < until);
    return f();
}

using Work = int (*)(void*, int64_t, int64_t);
std::atomic<int64_t> helped{0};  // chunks that were not done by callers

class Job {
  public:
    Job(Work work, void* context, const int64_t* chunks, int64_t steps, int threads) : work_(work), context_(context) {
        before_.reserve(size_t(steps) + 1);
        before_.push_back(0);
        int64_t most = 1;
        for (int64_t s = 0; s < steps; s++) {
            before_.push_back(before_.back() + chunks[s]);
            most = std::max(most, chunks[s]);
        }
        parts_ = int(std::min<int64_t>({threads, most, MOST_PARTS}));
    }

    // Takes part until nothing is left to be claimed; the caller until everything is done.
    void take_part(bool caller) {
        const int mine = joined_.fetch_add(1, std::memory_order_relaxed) % parts_;
        const int64_t steps = int64_t(before_.size()) - 1;
        for (int64_t step = 0; step < steps; step++) {
            const int64_t end = before_[size_t(step) + 1];
            if (done_.load(std::memory_order_acquire) >= end) continue;
            int64_t did = 0;
            for (int p = 0; p < parts_; p++) did += claim(step, (mine + p) % parts_);
            if (!caller && did > 0) helped.fetch_add(did, std::memory_order_relaxed);
            if (did > 0 && done_.fetch_add(did) + did == end) {
                if (asleep_.load() > 0) {
                    std::lock_guard<std::mutex> lock(mutex_);
                    finished_.notify_all();
                }
            } else if (caller || step + 1 < steps) {
                wait(end);
            }
        }
    }
    int failed() const { return failed_.load(std::memory_order_relaxed); }
    bool done() const { return done_.load(std::memory_order_acquire) == before_.back(); }

  private:
    // Does chunks of a part until all are claimed. A part's counter holds the step that it belongs to, too: who comes from an
    // earlier step claims nothing, and who comes first from a later one begins anew. Nobody has to set it back.
    int64_t claim(int64_t step, int part) {
        const int64_t count = before_[size_t(step) + 1] - before_[size_t(step)];
        const uint64_t here = uint64_t(step + 1) << 32, first = uint64_t(count * part / parts_);
        const uint64_t end = uint64_t(count * (part + 1) / parts_);
        std::atomic<uint64_t>& next = next_[part].value;
        int64_t did = 0;
        for (uint64_t seen = next.load(std::memory_order_relaxed);;) {
            if (seen >> 32 > uint64_t(step + 1)) return did;
            const uint64_t chunk = seen < here ? first : seen - here;
            if (chunk >= end) return did;
            if (!next.compare_exchange_weak(seen, here + chunk + 1, std::memory_order_relaxed)) continue;
            seen = here + chunk + 1;
            if (failed() == 0) {
                const int error = work_(context_, step, int64_t(chunk));
                if (error != 0) failed_.store(error, std::memory_order_relaxed);
            }
            did++;
        }
    }
    void wait(int64_t chunks) {
        const auto over = [&] { return done_.load(std::memory_order_acquire) >= chunks; };
        if (spin_until(BETWEEN_STEPS, over)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        finished_.wait(lock, [&] { return done_.load() >= chunks; });
        asleep_.fetch_sub(1);
    }

    static constexpr int MOST_PARTS = 16;
    struct alignas(64) Next {
        std::atomic<uint64_t> value{0};  // (step + 1) * 2^32 + chunk
    };
    Next next_[MOST_PARTS];
    alignas(64) std::atomic<int64_t> done_{0};  // chunks of all steps
    alignas(64) std::atomic<int> asleep_{0};
    std::atomic<int> joined_{0}, failed_{0};
    const Work work_;
    void* const context_;
    std::vector<int64_t> before_;  // chunks before each step, and of all
    int parts_;
    std::mutex mutex_;
    std::condition_variable finished_;
};

class Pool {
  public:
    void run(const std::shared_ptr<Job>& job, int threads, bool wake) {  // else only those that are awake are asked
        int64_t helpers, sleepers;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            const int64_t awake = int64_t(workers_.size()) - sleeping_;
            const int64_t wanted = std::min<int64_t>(threads - 1, wake ? threads : awake);
            try {
                while (int64_t(workers_.size()) < wanted) workers_.emplace_back([this, mine = generation_] { loop(mine); });
            } catch (const std::system_error&) {  // no thread to be had: those that are there, and the caller, do it
            }
            helpers = std::min<int64_t>(wanted, int64_t(workers_.size()));
            jobs_.insert(jobs_.end(), size_t(helpers), job);  // once for each helper that may join
            sleepers = wake ? std::min<int64_t>(helpers, sleeping_) : 0;
        }
        // Only now: who is called while the lock is held runs into it, and is put to sleep.
        if (helpers > 0) waiting_.store(helpers, std::memory_order_release);
        for (int64_t i = 0; i < sleepers; i++) wake_.notify_one();
        job->take_part(true);
        // Whoever has not come by now is not needed.
        std::lock_guard<std::mutex> lock(mutex_);
        jobs_.erase(std::remove(jobs_.begin(), jobs_.end(), job), jobs_.end());
        waiting_.store(int64_t(jobs_.size()), std::memory_order_release);
    }
    void shut_down() {
        std::vector<std::thread> workers;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            workers.swap(workers_);
            generation_++;
            waiting_.store(1, std::memory_order_release);
            wake_.notify_all();
        }
        for (auto& worker : workers) worker.join();
    }

  private:
    void loop(int mine) {
        for (;;) {
            std::shared_ptr<Job> job;
            spin_until(BETWEEN_JOBS, [&] { return waiting_.load(std::memory_order_acquire) > 0; });
            {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_++;
                wake_.wait(lock, [&] { return generation_ != mine || !jobs_.empty(); });
                sleeping_--;
                if (generation_ != mine) return;
                job = jobs_.front();
                jobs_.pop_front();
                waiting_.store(int64_t(jobs_.size()), std::memory_order_release);
            }
            if (!job->done()) job->take_part(false);
        }
    }
    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<std::shared_ptr<Job>> jobs_;
    std::vector<std::thread> workers_;
    std::atomic<int64_t> waiting_{0};
    int sleeping_ = 0;
    int generation_ = 0;  // workers of an earlier one leave
};

// On the heap and never freed: a forked child inherits a pool whose threads did not come along, and takes a new one.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
    static const bool once = [] {
        pool.store(new Pool);
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });
#endif
        return true;
    }();
    (void)once;
    return *pool.load();
}

constexpr int64_t ALONE_PRODUCTS = 1 << 19;  // less work than this is done before another thread has come
constexpr int64_t WAKE_PRODUCTS = 1 << 22;   // and less than this before another thread has woken

}  // namespace

extern "C" {

// Calls work(context, step, chunk) for each of chunks[step], below 2^32 of each of `steps`, on so many threads. Every chunk of a
// step is done before any of the next begins. `products`: multiplications of all steps, which tell whether to wake anyone.
// After a call that did not return 0 no other is begun, and what it returned is returned. Else 0; 1 where memory runs out.
// Calls throw nothing. They all have returned when this returns.
int nearplane_steps(int (*work)(void*, int64_t, int64_t), void* context, const int64_t* chunks, int64_t steps, int64_t products,
                    int threads) {
    if (threads <= 1 || products < ALONE_PRODUCTS || (steps == 1 && chunks[0] <= 1)) {
        for (int64_t step = 0; step < steps; step++)
            for (int64_t c = 0; c < chunks[step]; c++)
                if (const int error = work(context, step, c)) return error;
        return 0;
    }
    try {
        const auto job = std::make_shared<Job>(work, context, chunks, steps, threads);
        the_pool().run(job, threads, products >= WAKE_PRODUCTS);
        return job->failed();
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Chunks that other threads than callers have done so far: tells tests that some have come.
int64_t nearplane_helped() { return helped.load(std::memory_order_relaxed); }

// Joins the workers; the next call that needs them starts new ones.
void nearplane_shut_down() {
    if (pool.load() != nullptr) the_pool().shut_down();
}
}
