// Exact top-K on a CUDA device. csrc/topk/topk.h has the contract.
#pragma once

#include <cstdint>
#include <string>

#include "catalog/plan.h"

namespace lares_fast {

// All pointers are device pointers. The host does not see the values of the exclusion lists. A query gets scores of NaN and
// ids of -1 if its offsets are outside of 0..E or decrease, or if an id is not an item. Scores are 3xTF32 products of tensor
// cores with fp32 sums. With `plain` they are fused multiply-adds one after the other, with the bits of topk_cpu.
struct TopkCuda {
    const float* query;                   // [B, D]
    const float* items;                   // [N, D]
    const float* bias;                    // [N] or null
    const std::int64_t* exclude_offsets;  // [B + 1] or null
    const std::int64_t* exclude_ids;      // [E], ascending within each query, repeats allowed
    float* scores;                        // [B, k]
    std::int64_t* ids;                    // [B, k]
    void* workspace;                      // plan_topk(...).workspace_bytes
    std::int64_t B, N, D, k, E;
    bool plain;
};

// Enqueues work on `stream` of `device`. It allocates nothing and waits for nothing. Returns the error of the launch, or
// "". Throws std::invalid_argument for bad sizes and std::runtime_error if the device is unusable.
std::string topk_cuda(const TopkCuda& call, const DeviceLimits& limits, int device, std::uintptr_t stream);

}  // namespace lares_fast
