// The part of the cross entropy that is compiled once for each instruction set.
#pragma once

#include <cstdint>

#include "catalog/catalog.h"
#include "target_rank/target_rank_kernel.h"

namespace lares_fast {

constexpr int MAX_LANES = 16;

struct SumScan {
    Catalog catalog;
    const float* query;  // [B, D] as tiles, csrc/catalog/query_tiles.h
    std::int64_t B;
    const std::int64_t* target;  // [B]: the item that is left out of the sum
    float base, base_rest;       // the terms are 2^((base + base_rest) (score - reference)); base_rest is the rounding of base
    float* reference;  // [B]: a score, raised when a term exceeds 2^24; NaN after a NaN score
    double* sum;       // [B]: the terms are added
    float* limit;      // [B] workspace: the score above which the reference is raised
    float* lanes;      // [B][MAX_LANES] workspace that holds zeros
    float* scratch;    // [D][panel] + [panel]
    RankScan* rank;    // for the same queries and items, or null
};

// A matrix in panels is [width / columns][B][columns].
struct GradientScan {
    const float* items;  // [N, D]
    std::int64_t D;
    std::int64_t width;      // D rounded up to `columns`
    const float* query;      // [B, D] as tiles
    const float* weighted;   // [B, width] in panels: the rows of the queries times their factors
    const float* reference;  // [B]
    const std::int64_t* target;  // [B]: the item that is left out
    std::int64_t B;
    float base, base_rest;   // the terms t_bj are 2^((base + base_rest) (s_bj - reference_b))
    float* d_hidden;  // [B, width] in panels: sum_j t_bj items[j] is added; or null
    float* d_items;   // [N, D]: sum_b t_bj weighted[b], or null
    bool add;         // add to the values in d_items instead of replacing them
    float* scratch;   // as many floats as gradient_scratch returns
};

struct CrossEntropyKernel {
    int panel, rows;
    int columns;  // columns of a block of the gradients
    int tile;     // items that share one pass over the queries: whole panels
    // Both take the items [first, last). `first` is a multiple of the panel.
    void (*sums)(const SumScan&, std::int64_t first, std::int64_t last);
    void (*gradients)(const GradientScan&, std::int64_t first, std::int64_t last);
    std::int64_t (*gradient_scratch)(std::int64_t D, std::int64_t width);
    float (*score)(const float* query, const float* item, std::int64_t D);
};

const CrossEntropyKernel* best_cross_entropy_kernel();

}  // namespace lares_fast
