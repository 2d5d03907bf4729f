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

// Each query's exclusions in ascending order.
class SortedExclusions {
   public:
    template <class Call>
    void assign(const Call& call, std::int64_t first, std::int64_t B) {
        const std::int64_t* offsets = call.exclude_offsets;
        ids_.assign(call.exclude_ids + offsets[first], call.exclude_ids + offsets[first + B]);
        offsets_.clear();
        for (std::int64_t b = first; b <= first + B; ++b) offsets_.push_back(offsets[b] - offsets[first]);
        for (std::int64_t b = 0; b < B; ++b) {
            if (!std::is_sorted(begin(b), last(b))) std::sort(begin(b), last(b));
        }
    }

    std::int64_t* begin(std::int64_t b) { return ids_.data() + offsets_[static_cast<std::size_t>(b)]; }
    std::int64_t* last(std::int64_t b) { return begin(b + 1); }

   private:
    std::vector<std::int64_t> ids_, offsets_;
};

}  // namespace lares_fast
