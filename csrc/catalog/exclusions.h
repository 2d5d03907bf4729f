// Exclusion lists of queries in the form that the kernels read.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lares_fast {

// The excluded ids of each query in ascending order, without repeats. `call` has exclude_offsets, exclude_ids and B.
class SortedExclusions {
   public:
    template <class Call>
    explicit SortedExclusions(const Call& call) {
        if (!call.exclude_offsets) return;
        ids_.assign(call.exclude_ids, call.exclude_ids + call.exclude_offsets[call.B]);
        offsets_.assign(call.exclude_offsets, call.exclude_offsets + call.B + 1);
        for (std::int64_t b = 0; b < call.B; ++b) {
            const auto from = ids_.begin() + call.exclude_offsets[b], to = ids_.begin() + call.exclude_offsets[b + 1];
            if (!std::is_sorted(from, to)) std::sort(from, to);
            ends_.push_back(std::unique(from, to) - ids_.begin());
        }
    }

    const std::int64_t* begin(std::int64_t b) const { return ids_.data() + offsets_[static_cast<std::size_t>(b)]; }
    const std::int64_t* end(std::int64_t b) const { return ids_.data() + ends_[static_cast<std::size_t>(b)]; }
    std::int64_t count(std::int64_t b) const { return ends_.empty() ? 0 : end(b) - begin(b); }

   private:
    std::vector<std::int64_t> ids_, offsets_, ends_;
};

}  // namespace lares_fast
