// What ranking needs to know of its queries before it walks over the items.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "target_rank/target_rank_kernel.h"

namespace lares_fast {

// The queries' order by target and their targets' scores; completes `scan`, and must outlive it.
class RankQueries {
   public:
    RankQueries(RankScan& scan, const RankKernel& kernel) : order_(static_cast<std::size_t>(scan.B)), own_(order_.size()) {
        std::iota(order_.begin(), order_.end(), std::int64_t{0});
        std::sort(order_.begin(), order_.end(), [&](std::int64_t a, std::int64_t b) { return scan.target[a] < scan.target[b]; });
        for (std::int64_t b = 0; b < scan.B; ++b) own_[static_cast<std::size_t>(b)] = kernel.own(scan, b);
        scan.order = order_.data();
        scan.own = own_.data();
    }

   private:
    std::vector<std::int64_t> order_;
    std::vector<float> own_;
};

}  // namespace lares_fast
