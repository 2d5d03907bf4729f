// Computes how the CUDA kernels of the catalog ops are launched, from the sizes and the device's limits alone.
#pragma once

#include <cstdint>

#include "cuda/limits.h"

namespace lares_fast {

// The part of the score matrix that one block computes. Each warp owns WARP_QUERIES rows of it, and no two warps share a
// query.
constexpr int WARP = 32;
constexpr int WARPS = 4;
constexpr int THREADS = WARP * WARPS;
constexpr int WARP_QUERIES = 32;
constexpr int TILE_QUERIES = WARPS * WARP_QUERIES;
constexpr int TILE_ITEMS = 64;
// Blocks that fit into the registers of a multiprocessor. The kernels are compiled for this number, and no more are
// planned.
constexpr int BLOCKS_A_MULTIPROCESSOR = 3;
// Dimensions that are in shared memory at a time.
constexpr int CHUNK = 32;
// Candidates of a query that wait until they are sorted into its list.
constexpr int QUEUE = 32;
constexpr std::int64_t TOPK_LIMIT = 1024;

struct ScanPlan {
    std::int64_t query_tiles, splits;  // the grid
    std::int64_t item_tiles, chunks;
    bool resident;  // the queries stay in shared memory; otherwise they are read again with every tile
    std::int64_t shared_bytes;
};

struct TopkPlan {
    ScanPlan scan;
    // The distance from the first tile of a split to the first tile of the next split, modulo the number of tiles and coprime
    // with it.
    std::int64_t stride;
    std::int64_t step;         // from one tile of a split to its next one: splits * stride, modulo the number of tiles
    std::int64_t sorted;       // k rounded up to a multiple of WARP
    std::int64_t merge_warps;  // a power of two
    std::int64_t workspace_bytes;
};

// Both throw std::invalid_argument if the kernels cannot take the sizes.
ScanPlan plan_target_rank(std::int64_t B, std::int64_t N, std::int64_t D, const DeviceLimits& limits);
TopkPlan plan_topk(std::int64_t B, std::int64_t N, std::int64_t D, std::int64_t k, const DeviceLimits& limits);

}  // namespace lares_fast
