// The values of queries that ranking needs before it reads the items.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "target_rank/target_rank_kernel.h"

namespace lares_fast {

// The order of the queries by target, and the scores of their targets. The constructor sets the pointers of `scan`, so this
// object must outlive `scan`.
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
