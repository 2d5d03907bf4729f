// Place of the target among all items on a CUDA device; the contract is that of csrc/target_rank/target_rank.h.
#pragma once

#include <cstdint>
#include <string>

#include "catalog/plan.h"

namespace lares_fast {

// Pointers are the device's. Scores are those of topk_cuda, the target's own included. A target that is no item has the rank N
// behind all items, and so has `of_kept` of a query whose list is not valid as topk_cuda says.
struct TargetRankCuda {
    const float* query;                   // [B, D]
    const float* items;                   // [N, D]
    const float* bias;                    // [N] or null
    const std::int64_t* target;           // [B]
    const std::int64_t* exclude_offsets;  // [B + 1] or null
    const std::int64_t* exclude_ids;      // [E], ascending within each query, repeats allowed
    std::int64_t* of_all;                 // [B]: the rank among all items
    std::int64_t* of_kept;                // [B]: the rank among those that are not excluded
    std::int64_t B, N, D, E;
    bool ties_by_id;
    bool plain;
};

// As topk_cuda; needs no workspace.
std::string target_rank_cuda(const TargetRankCuda& call, const DeviceLimits& limits, int device, std::uintptr_t stream);

}  // namespace lares_fast
