// A block of queries as the kernels read it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace lares_fast {

// Tiles of `rows` queries, then of 4, 2 and 1: [D][r] each, the tile of query b beginning at b * D.
template <class T>
std::vector<T> query_tiles(const T* query, std::int64_t B, std::int64_t D, std::int64_t rows) {
    std::vector<T> tiles(static_cast<std::size_t>(B * D));
    for (std::int64_t b = 0, size = rows; b < B; b += size) {
        while (size > B - b) size = size > 4 ? 4 : size / 2;
        for (std::int64_t r = 0; r < size; ++r) {
            for (std::int64_t d = 0; d < D; ++d) tiles[static_cast<std::size_t>(b * D + d * size + r)] = query[(b + r) * D + d];
        }
    }
    return tiles;
}

// Each query's exclusions in ascending order, each once.
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
