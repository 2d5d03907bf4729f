// The item table as the kernels read it.
#pragma once

#include <cstdint>

namespace lares_fast {

struct Catalog {
    const float* items;   // [N, D]
    const float* panels;  // the same as panels [D][panel], or null
    const float* bias;    // [N] or null
    std::int64_t N, D;
};

}  // namespace lares_fast
