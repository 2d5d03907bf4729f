// A catalog prepared once for many calls: panels, and int8 tables for screening where the CPU multiplies bytes.
#pragma once

#include <cstdint>

namespace lares_fast {

// Sizes of an index of N items of width D at the SIMD level in force.
struct IndexShape {
    std::int64_t panel;   // items a panel
    std::int64_t panels;  // P
    std::int64_t words;   // ceil(D / 4): four codes a 32-bit word; 0 where nothing is screened
};
IndexShape index_shape(std::int64_t N, std::int64_t D);

// Memory of the caller. With c the centre and scale s of a panel, item x is s * code + c, but for a residual.
struct IndexTables {
    const float* centre;  // [D], finite
    float* panels;        // [P][D][panel]
    std::int8_t* codes;   // [P][words][panel][4]
    std::int32_t* start;  // [P][panel]: -128 * sum of the item's codes, since queries are coded with an offset of 128
    float* bounds;        // [P][3]: 1 / s; largest |residual| + allowance for fp32 sums; largest |s * code|
};

void build_index(const float* items, std::int64_t N, std::int64_t D, const IndexTables& tables, std::int64_t threads);

}  // namespace lares_fast
