// A catalog that is prepared once for many calls: panels, and int8 tables for screening if the CPU multiplies bytes.
#pragma once

#include <cstdint>

namespace lares_fast {

// Sizes of an index of N items of width D at the SIMD level in force. If nothing is screened, the last four are 0.
struct IndexShape {
    std::int64_t panel;         // items of a panel
    std::int64_t panels;        // number of panels in fp32
    std::int64_t coded_panel;   // items of a panel of codes
    std::int64_t coded_panels;  // S, the number of panels of codes
    std::int64_t code_bytes;    // bytes of one item's codes
    std::int64_t lane_bytes;    // bytes of one integer sum
};
IndexShape index_shape(std::int64_t N, std::int64_t D);

// Memory of the caller. Item x is centre + scale * (s * code + residual), where s is the step of its panel.
struct IndexTables {
    const float* centre;  // [D], finite
    const float* scale;   // [D], powers of two
    float* panels;        // [panels][D][panel]
    std::int8_t* codes;   // [S][code_bytes / group][coded_panel][group]
    void* start;          // [S][coded_panel] integers of lane_bytes: the sum of an item with a query whose codes are all 0
    float* bounds;        // [S][4]: 1 / s; largest |residual|; largest |s * code|; allowance for the rounding of fp32 sums
};

void build_index(const float* items, std::int64_t N, std::int64_t D, const IndexTables& tables, std::int64_t threads);

}  // namespace lares_fast
