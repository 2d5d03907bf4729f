// The part of the target's rank that is compiled once a SIMD level.
#pragma once

#include <cstdint>

#include "catalog/catalog.h"

namespace lares_fast {

struct RankScan {
    Catalog catalog;
    const float* rows;   // [B, D]
    const float* query;  // the same as tiles, csrc/topk/query_tiles.h
    std::int64_t B;
    const std::int64_t* target;  // [B]
    const std::int64_t* order;   // [B]: queries by ascending target
    const float* own;            // [B]: the target's score, -inf for NaN
    bool ties_by_id;
    float* now;          // [B] workspace: what an item of the current panel must beat
    float* scratch;      // [D][panel] + [panel]
    std::int64_t* rank;  // [B]: += the items that outrank the target
};

struct RankKernel {
    int panel, rows;
    float (*own)(const RankScan&, std::int64_t b);
    // Counts over the items [first, last) of a panel's multiple on.
    void (*scan)(const RankScan&, std::int64_t first, std::int64_t last);
    // How many of `ids` [n] outrank the target of query b; the target itself never does.
    std::int64_t (*outranking)(const RankScan&, std::int64_t b, const std::int64_t* ids, std::int64_t n);
};

const RankKernel* best_rank_kernel();

}  // namespace lares_fast
