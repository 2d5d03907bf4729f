// Exact top-K of query . item + bias over the whole catalog.
#pragma once

#include <cstdint>

#include "topk/index.h"

namespace lares_fast {

// Results are ordered by descending score, then by ascending id. NaN ranks as -inf and is returned as -inf; -0 and 0 are
// equal. A score is the fp32 sum of the bias and the D products in that order, with fused multiply-adds if the SIMD level
// has them. It depends on its two rows and the bias alone: neither the batch size nor the number of threads changes a bit
// of it. If there are fewer than k candidates, id -1 and score -inf fill the rest.
struct Topk {
    const float* query;                   // [B, D]
    const float* items;                   // [N, D]
    const float* bias;                    // [N] or null
    const std::int64_t* exclude_offsets;  // [B + 1] or null: row b leaves out exclude_ids[offsets[b] .. offsets[b + 1])
    const std::int64_t* exclude_ids;      // in any order, repeats allowed
    float* scores;                        // [B, k]
    std::int64_t* ids;                    // [B, k]
    std::int64_t B, N, D, k;
    IndexTables index;                    // an index of these items, or nulls; it does not change the result
};

// Throws std::invalid_argument if a size, pointer or exclusion is out of range. Each thread needs workspace for a panel of
// items and for a block of queries: about 2k candidates and the exclusions of each query. The candidates of a block take at
// most 16 MiB.
void topk_cpu(const Topk& call, std::int64_t threads);

}  // namespace lares_fast
