// Runs one function on several threads. There is no thread pool, so no thread waits in the background at a fork or an exit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace lares_fast {

// The most threads of one call. More would only take memory.
constexpr std::int64_t MOST_THREADS = 1024;

// Runs `work` on up to `threads` threads, the calling thread included, and rethrows the first exception.
// `work` must take its tasks from a shared counter: if the system grants fewer threads, they still do all tasks.
template <class Work>
void run_on_threads(std::int64_t threads, const Work& work) {
    std::exception_ptr error;
    std::mutex mutex;
    const auto guarded = [&] {
        try {
            work();
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
        }
    };
    const auto wanted = static_cast<std::size_t>(std::clamp<std::int64_t>(threads, 1, MOST_THREADS) - 1);
    std::vector<std::thread> helpers;
    try {
        helpers.reserve(wanted);
        while (helpers.size() < wanted) helpers.emplace_back(guarded);
    } catch (const std::exception&) {
        // The system grants no more threads. The running threads take the remaining tasks.
    }
    guarded();
    for (std::thread& helper : helpers) helper.join();
    if (error) std::rethrow_exception(error);
}

}  // namespace lares_fast
