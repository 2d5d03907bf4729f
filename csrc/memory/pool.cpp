#include "memory/pool.h"

#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "memory/aligned.h"

namespace lares_fast {
namespace {

constexpr std::size_t PAGE = std::size_t{2} << 20;
// The pool keeps at most this many buffers. One call needs one a thread, one for the weights and one for the gradients.
constexpr std::size_t MOST_IDLE = 32;

struct Buffer {
    float* memory;
    std::int64_t floats;
};

// The idle buffers are in an array, because a destructor returns buffers and must not need memory for that. Nothing here is
// destroyed, because a thread may still run after main has ended.
std::mutex mutex;
Buffer idle[MOST_IDLE];
std::size_t idle_count = 0;

Buffer take_idle(std::size_t place) {
    const Buffer taken = idle[place];
    idle[place] = idle[--idle_count];
    return taken;
}

#if !defined(_WIN32)
// Only the thread that forks exists in the child. If another thread had locked the mutex then, the child could never lock it,
// so the thread that forks locks it first.
[[maybe_unused]] const int registered =
    pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
#endif

float* allocate(std::int64_t floats) {
    const auto size = static_cast<std::size_t>(floats);
    if (auto* const memory = new (std::align_val_t{CACHE_LINE}, std::nothrow) float[size]) return memory;
    // The idle buffers may be what is missing.
    {
        const std::lock_guard<std::mutex> lock(mutex);
        while (idle_count > 0) FreeAligned()(take_idle(idle_count - 1).memory);
    }
    return new (std::align_val_t{CACHE_LINE}) float[size];
}

}  // namespace

void prefer_large_pages(float* memory, std::int64_t floats) {
#if defined(__linux__)
    const auto begin = (reinterpret_cast<std::uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
    const auto end = reinterpret_cast<std::uintptr_t>(memory + floats) / PAGE * PAGE;
    // A failure is ignored: small pages work too.
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)floats;
#endif
}

void ReturnToPool::operator()(float* memory) const {
    const std::lock_guard<std::mutex> lock(mutex);
    if (idle_count < MOST_IDLE) {
        idle[idle_count++] = {memory, floats};
    } else {
        FreeAligned()(memory);
    }
}

PooledFloats take_from_pool(std::int64_t floats) {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        std::size_t best = idle_count;
        for (std::size_t i = 0; i < idle_count; ++i) {
            if (idle[i].floats >= floats && (best == idle_count || idle[i].floats < idle[best].floats)) best = i;
        }
        if (best < idle_count) {
            const Buffer taken = take_idle(best);
            return PooledFloats(taken.memory, ReturnToPool{taken.floats});
        }
    }
    float* const memory = allocate(floats);
    prefer_large_pages(memory, floats);
    std::memset(memory, 0, sizeof(float) * static_cast<std::size_t>(floats));
    return PooledFloats(memory, ReturnToPool{floats});
}

}  // namespace lares_fast
