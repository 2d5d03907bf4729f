// A pool of large buffers. Calls take buffers and return them, because the first write to fresh pages costs more time than
// the work on them.
#pragma once

#include <cstdint>
#include <memory>

namespace lares_fast {

struct ReturnToPool {
    std::int64_t floats;
    void operator()(float* memory) const;
};
using PooledFloats = std::unique_ptr<float[], ReturnToPool>;

// Returns at least `floats` floats that begin at a cache line. They hold zeros or the values of an earlier caller.
PooledFloats take_from_pool(std::int64_t floats);

// Asks the system for large pages for memory that is about to be written for the first time.
void prefer_large_pages(float* memory, std::int64_t floats);

}  // namespace lares_fast
