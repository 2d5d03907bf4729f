// Exact top-K on a CUDA device; the contract is that of csrc/topk/topk.h.
#pragma once

#include <cstdint>
#include <string>

#include "catalog/plan.h"

namespace lares_fast {

// Pointers are the device's. A query whose list has offsets outside of 0..E or falling, or ids that are no items, gets scores of
// NaN and ids of -1: the host does not see these values. Scores are 3xTF32 products of tensor cores with fp32 sums, or with `plain` one fused
// multiply-add after the other, which are the bits of topk_cpu.
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

// Enqueues on `stream` of `device`; allocates nothing and waits for nothing. Returns why the device refuses, or "".
// Throws std::invalid_argument for bad sizes and std::runtime_error where the device is beyond use.
std::string topk_cuda(const TopkCuda& call, const DeviceLimits& limits, int device, std::uintptr_t stream);

}  // namespace lares_fast
