// Queries in the layout that the kernels read.
#pragma once

#include <cstdint>
#include <vector>

namespace lares_fast {

// Copies queries [B, D] to tiles [D][r]. Tiles have r = `rows` queries; the last queries are in tiles of 4, 2 and 1. The tile
// whose first query is b begins at b * D.
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

}  // namespace lares_fast
