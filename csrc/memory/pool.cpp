#include "memory/pool.h"

#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lares_fast {
namespace {

constexpr std::size_t PAGE = std::size_t{2} << 20;
// More than this many are not kept: there is one a thread, the weights' and the gradients'.
constexpr std::size_t KEPT = 32;

std::mutex mutex;
// Never destroyed: a thread may outlive the end of main.
auto& idle = *new std::vector<std::pair<float*, std::int64_t>>;

void release(float* memory) { ::operator delete[](memory, std::align_val_t{64}); }

}  // namespace

void prefer_large_pages(float* memory, std::int64_t floats) {
#if defined(__linux__)
    const auto begin = (reinterpret_cast<std::uintptr_t>(memory) + PAGE - 1) / PAGE * PAGE;
    const auto end = reinterpret_cast<std::uintptr_t>(memory + floats) / PAGE * PAGE;
    // Only a wish: without it the memory works as well.
    if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)floats;
#endif
}

void GiveBack::operator()(float* memory) const {
    const std::lock_guard<std::mutex> lock(mutex);
    if (idle.size() < KEPT) {
        idle.emplace_back(memory, floats);
    } else {
        release(memory);
    }
}

Lease lease(std::int64_t floats) {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        std::size_t best = idle.size();
        for (std::size_t i = 0; i < idle.size(); ++i) {
            if (idle[i].second >= floats && (best == idle.size() || idle[i].second < idle[best].second)) best = i;
        }
        if (best < idle.size()) {
            const auto [memory, size] = idle[best];
            idle.erase(idle.begin() + static_cast<std::ptrdiff_t>(best));
            return Lease(memory, GiveBack{size});
        }
    }
    auto* const memory = new (std::align_val_t{64}) float[static_cast<std::size_t>(floats)];
    prefer_large_pages(memory, floats);
    std::memset(memory, 0, sizeof(float) * static_cast<std::size_t>(floats));
    return Lease(memory, GiveBack{floats});
}

}  // namespace lares_fast
