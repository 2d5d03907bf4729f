#include "memory/pool.h"

#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "memory/aligned.h"

namespace lares_fast {
namespace {

constexpr std::size_t PAGE = std::size_t{2} << 20;
// The pool keeps at most this many buffers. One call needs one a thread, one for the weights and one for the gradients.
constexpr std::size_t MOST_IDLE = 32;

std::mutex mutex;
// The vector is never destroyed, because a thread may still run after main has ended.
auto& idle = *new std::vector<std::pair<float*, std::int64_t>>;

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
    if (idle.size() < MOST_IDLE) {
        idle.emplace_back(memory, floats);
    } else {
        FreeAligned()(memory);
    }
}

PooledFloats take_from_pool(std::int64_t floats) {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        std::size_t best = idle.size();
        for (std::size_t i = 0; i < idle.size(); ++i) {
            if (idle[i].second >= floats && (best == idle.size() || idle[i].second < idle[best].second)) best = i;
        }
        if (best < idle.size()) {
            const auto [memory, size] = idle[best];
            idle.erase(idle.begin() + static_cast<std::ptrdiff_t>(best));
            return PooledFloats(memory, ReturnToPool{size});
        }
    }
    auto* const memory = new (std::align_val_t{CACHE_LINE}) float[static_cast<std::size_t>(floats)];
    prefer_large_pages(memory, floats);
    std::memset(memory, 0, sizeof(float) * static_cast<std::size_t>(floats));
    return PooledFloats(memory, ReturnToPool{floats});
}

}  // namespace lares_fast
