// Memory that calls take, give back and take again: fresh pages cost more than the work on them.
#pragma once

#include <cstdint>
#include <memory>

namespace lares_fast {

struct GiveBack {
    std::int64_t floats;
    void operator()(float* memory) const;
};
using Lease = std::unique_ptr<float[], GiveBack>;

// At least `floats` floats that begin at a cache line; what they hold is finite or was a caller's.
Lease lease(std::int64_t floats);

// Asks for large pages for memory that is about to be written for the first time.
void prefer_large_pages(float* memory, std::int64_t floats);

}  // namespace lares_fast
