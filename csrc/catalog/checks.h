// Checks of the catalog ops. They run before any memory is read or written, and throw std::invalid_argument.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "base/require.h"

namespace lares_fast {

constexpr std::int64_t SIZE_LIMIT = std::numeric_limits<std::int64_t>::max() / 8;

inline void check_sizes(std::int64_t B, std::int64_t N, std::int64_t D, std::int64_t threads) {
    require(B >= 0 && N >= 0 && D >= 0, "B, N and D must not be negative");
    require(threads >= 1, "threads must be at least 1");
    require(N <= std::numeric_limits<std::int32_t>::max() - 1024, "N must stay below 2^31 - 1024");
    // The largest buffer of width D is a panel of 48 items.
    require(D <= (std::int64_t{1} << 31), "D is too large");
    const std::int64_t width = std::max<std::int64_t>(D, 1);
    require(B <= SIZE_LIMIT / width && N <= SIZE_LIMIT / width, "B * D or N * D is too large");
}

inline void check_inputs(const float* query, const float* items, std::int64_t N, std::int64_t D) {
    require(query || D == 0, "query must not be a null pointer");
    require(items || D == 0 || N == 0, "items must not be a null pointer");
}

inline void check_exclude(const std::int64_t* offsets, const std::int64_t* ids, std::int64_t B, std::int64_t N) {
    if (!offsets) return;
    require(offsets[0] == 0, "exclude offsets must start with 0");
    for (std::int64_t b = 0; b < B; ++b) require(offsets[b] <= offsets[b + 1], "exclude offsets must not decrease");
    require(ids || offsets[B] == 0, "exclude ids must not be a null pointer");
    for (std::int64_t i = 0; i < offsets[B]; ++i) {
        require(ids[i] >= 0 && ids[i] < N, "exclude ids must be item ids in [0, N)");
    }
}

}  // namespace lares_fast
