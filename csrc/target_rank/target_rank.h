// The rank of a target among all items, for each query.
#pragma once

#include <cstdint>

namespace lares_fast {

// rank[b] = #{j: j not excluded, j != target, s_j > s_t, or with ties_by_id s_j == s_t and j < t}. Scores have the bits of
// topk, for the target too, and NaN counts as -inf. An exclusion list never removes the target. rank_of_all[b] is the rank
// without exclusions, from the same scores.
struct TargetRank {
    const float* query;                   // [B, D]
    const float* items;                   // [N, D]
    const float* bias;                    // [N] or null
    const std::int64_t* target;           // [B], in [0, N)
    const std::int64_t* exclude_offsets;  // [B + 1] or null: row b leaves out exclude_ids[offsets[b] .. offsets[b + 1])
    const std::int64_t* exclude_ids;      // in any order, repeats allowed
    std::int64_t* rank;                   // [B]
    std::int64_t* rank_of_all;            // [B]
    std::int64_t B, N, D;
    bool ties_by_id;
};

// Throws std::invalid_argument if a size, pointer, target or exclusion is out of range.
void target_rank_cpu(const TargetRank& call, std::int64_t threads);

}  // namespace lares_fast
