// The part of the cross entropy that is compiled once a SIMD level.
#pragma once

#include <cstdint>

#include "target_rank/target_rank_kernel.h"
#include "catalog/catalog.h"

namespace lares_fast {

constexpr int MAX_LANES = 16;

struct SumScan {
    Catalog catalog;
    const float* query;  // [B, D] as tiles, csrc/topk/query_tiles.h
    std::int64_t B;
    const std::int64_t* target;  // [B]: the item left out of the sum
    float base;                  // the terms are 2^(base (score - reference))
    float* reference;  // [B]: a score, raised when one exceeds it by more than 2^24; NaN after a NaN score
    double* sum;       // [B]: += the terms
    float* limit;      // [B] workspace: the score above which the reference is raised
    float* lanes;      // [B][MAX_LANES] workspace, zeros
    float* scratch;    // [D][panel] + [panel]
    RankScan* rank;    // of the same queries and items, or null
};

// Matrices in panels are [width / columns][B][columns].
struct GradientScan {
    const float* items;  // [N, D]
    std::int64_t D;
    std::int64_t width;      // D rounded up to `columns`
    const float* query;      // [B, D] as tiles
    const float* weighted;   // [B, width] in panels: the queries' rows times their factors
    const float* reference;  // [B]
    const std::int64_t* target;  // [B]: the item left out
    std::int64_t B;
    float base;
    float* d_hidden;  // [B, width] in panels: += sum_j 2^(base (s_bj - reference_b)) items[j], or null
    float* d_items;   // [N, D]: sum_b 2^(base (s_bj - reference_b)) weighted[b], or null
    bool add;         // to what d_items holds
    float* scratch;   // gradient_scratch floats
};

struct CrossEntropyKernel {
    int panel, rows;
    int columns;  // width of a block of the gradients
    int tile;     // items that share one walk over the queries, whole panels
    // The items [first, last) of a panel's multiple on.
    void (*sums)(const SumScan&, std::int64_t first, std::int64_t last);
    void (*gradients)(const GradientScan&, std::int64_t first, std::int64_t last);
    std::int64_t (*gradient_scratch)(std::int64_t D, std::int64_t width);
    float (*score)(const float* query, const float* item, std::int64_t D);
};

const CrossEntropyKernel* best_cross_entropy_kernel();

}  // namespace lares_fast
