// The rank of a target among all items on a CUDA device. csrc/target_rank/target_rank.h has the contract.
#pragma once

#include <cstdint>
#include <string>

#include "catalog/plan.h"

namespace lares_fast {

// All pointers are device pointers. Scores have the bits of topk_cuda, for the target too. A target that is not an item has
// rank N, behind all items. `of_kept` is also N for a query whose exclusion list is not valid (see topk_cuda).
struct TargetRankCuda {
    const float* query;                   // [B, D]
    const float* items;                   // [N, D]
    const float* bias;                    // [N] or null
    const std::int64_t* target;           // [B]
    const std::int64_t* exclude_offsets;  // [B + 1] or null
    const std::int64_t* exclude_ids;      // [E], ascending within each query, repeats allowed
    std::int64_t* of_all;                 // [B]: the rank among all items
    std::int64_t* of_kept;                // [B]: the rank among the items that are not excluded
    std::int64_t B, N, D, E;
    bool ties_by_id;
    bool plain;
};

// Enqueues and reports errors like topk_cuda. It needs no workspace.
std::string target_rank_cuda(const TargetRankCuda& call, const DeviceLimits& limits, int device, std::uintptr_t stream);

}  // namespace lares_fast
