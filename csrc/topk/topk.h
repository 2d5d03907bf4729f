// Exact top-K of query . item + bias over the whole catalog.
#pragma once

#include <cstdint>

#include "topk/index.h"

namespace lares_fast {

// Order: score descending, then id ascending. NaN ranks, and is returned, as -inf; -0 and 0 tie.
// A score is the fp32 sum of the bias and the D products in that order, by fused multiply-adds where the SIMD level has
// them: it depends on nothing but its own two rows, so no batch size and no thread count changes a bit of it.
// Fewer than k candidates: id -1 and score -inf fill the rest.
struct Topk {
    const float* query;                   // [B, D]
    const float* items;                   // [N, D]
    const float* bias;                    // [N] or null
    const std::int64_t* exclude_offsets;  // [B + 1] or null: row b leaves out exclude_ids[offsets[b] .. offsets[b + 1])
    const std::int64_t* exclude_ids;      // in any order, repeats allowed
    float* scores;                        // [B, k]
    std::int64_t* ids;                    // [B, k]
    std::int64_t B, N, D, k;
    IndexTables index;                    // of the same items, or nulls; without effect on the answer
};

// Workspace beside the outputs, a thread: a panel of items and, for a block of queries that takes at most 16 MiB of them,
// about 2k candidates of each and its exclusions.
void topk_cpu(const Topk& call, std::int64_t threads);

}  // namespace lares_fast
