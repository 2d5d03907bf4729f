// Sorted lists of candidates in device memory. One warp keeps each list.
#pragma once

#include "catalog/scores.cuh"

namespace lares_fast {

// A candidate as one integer, ordered by score and then by the lower id. 0 means no candidate. Ids are below 2^32 - 1.
using Rank = unsigned long long;

__device__ __forceinline__ Rank make_rank(float score, std::int64_t id) {
    // Adding 0 turns -0 into 0.
    const std::uint32_t bits = __float_as_uint(score + 0.0f);
    const std::uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<Rank>(ordered) << 32 | ~static_cast<std::uint32_t>(id);
}

__device__ __forceinline__ std::int64_t rank_id(Rank rank) {
    return rank ? static_cast<std::int64_t>(~static_cast<std::uint32_t>(rank)) : -1;
}

__device__ __forceinline__ float rank_score(Rank rank) {
    if (rank == 0) return -INFINITY;
    const auto ordered = static_cast<std::uint32_t>(rank >> 32);
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

__device__ __forceinline__ Rank exchange(Rank mine, int distance, bool keep_greater) {
    const Rank other = __shfl_xor_sync(ALL_LANES, mine, distance);
    return (mine > other) == keep_greater ? mine : other;
}

// Sorts in descending order over the lanes. The input first falls and then rises, or is a rotation of such a sequence.
__device__ __forceinline__ Rank sort_bitonic(Rank mine, int lane) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) mine = exchange(mine, distance, (lane & distance) == 0);
    return mine;
}

__device__ inline Rank sort(Rank mine, int lane) {
#pragma unroll
    for (int size = 2; size < WARP; size *= 2) {
#pragma unroll
        for (int distance = size / 2; distance > 0; distance /= 2) {
            mine = exchange(mine, distance, ((lane & distance) == 0) == ((lane & size) == 0));
        }
    }
    return sort_bitonic(mine, lane);
}

// Merges the warp's WARP ranks, which descend over the lanes, into list [length]. A place of the list is always touched by
// the same lane.
__device__ inline void merge(Rank* list, int length, Rank mine, int lane) {
#pragma unroll 1
    for (int at = 0; at < length; at += WARP) {
        const Rank best = __shfl_sync(ALL_LANES, mine, 0);
        if (best == 0) return;
        const Rank old = list[at + lane];
        if (best < __shfl_sync(ALL_LANES, old, WARP - 1)) continue;
        const Rank reversed = __shfl_xor_sync(ALL_LANES, mine, WARP - 1);
        list[at + lane] = sort_bitonic(old > reversed ? old : reversed, lane);
        mine = sort_bitonic(old > reversed ? reversed : old, lane);
    }
}

}  // namespace lares_fast
