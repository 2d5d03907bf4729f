// The limits of a device that a launch depends on.
#pragma once

#include <cstdint>

namespace lares_fast {

// Shared memory is in bytes.
struct DeviceLimits {
    std::int64_t multiprocessors, shared_a_block, shared_a_multiprocessor;
};

}  // namespace lares_fast
