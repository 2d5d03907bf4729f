// The part of the target's rank that is compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "catalog/catalog.h"

namespace lares_fast {

struct RankScan {
    Catalog catalog;
    const float* rows;   // [B, D]
    const float* query;  // the same rows in tiles, csrc/catalog/query_tiles.h
    std::int64_t B;
    const std::int64_t* target;  // [B]
    const std::int64_t* order;   // [B]: queries by ascending target
    const float* own;            // [B]: the target's score, -inf for NaN
    bool ties_by_id;
    float* now;          // [B] workspace: the score that an item of the current panel must beat
    float* scratch;      // [D][panel] + [panel]
    std::int64_t* rank;  // [B]: the number of items that outrank the target is added
};

struct RankKernel {
    int panel, rows;
    float (*own)(const RankScan&, std::int64_t b);
    // Counts over the items [first, last). `first` is a multiple of the panel.
    void (*scan)(const RankScan&, std::int64_t first, std::int64_t last);
    // Returns how many of `ids` [n] outrank the target of query b. The target itself never does.
    std::int64_t (*outranking)(const RankScan&, std::int64_t b, const std::int64_t* ids, std::int64_t n);
};

const RankKernel* best_rank_kernel();

}  // namespace lares_fast
