// The item table in the form that the kernels read.
#pragma once

#include <cstdint>

namespace lares_fast {

struct Catalog {
    const float* items;   // [N, D]
    const float* panels;  // the items in panels [D][panel], or null
    const float* bias;    // [N] or null
    std::int64_t N, D;
};

}  // namespace lares_fast
