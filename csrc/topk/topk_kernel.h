// The part of top-K that is compiled once a SIMD level, and the state it shares with csrc/topk/topk_cpu.cpp.
#pragma once

#include <cstdint>

#include "catalog/catalog.h"

namespace lares_fast {

// Candidates of one block of queries. Those of query b stand in ids' ascending order at b * stride.
struct Candidates {
    float* scores;
    std::int32_t* ids;
    std::int64_t* size;      // [B]
    std::int64_t* clean;     // [B]: the first `clean` candidates were compared with the exclusions
    float* threshold;        // [B]: what does not beat it cannot be among the best K; NaN before K are known
    const std::int64_t** excluded;      // [B]: the next of the query's ascending exclusions, or null
    const std::int64_t** excluded_end;  // [B]
    std::int64_t stride;                // capacity + room for vector stores
    std::int64_t capacity;
    std::int64_t K;
};

struct TopkScan {
    Catalog catalog;
    const float* query;  // tiles of r queries, [D][r] each, beginning at query + b * D
    std::int64_t B;
    float* scratch;      // [D][panel] + [panel], at a cache line's beginning
    Candidates best;
};

struct TopkKernel {
    int panel;  // items a panel
    int rows;   // queries a tile; the rest of a block is cut to tiles of 4, 2 and 1
    int slack;  // elements that vector stores may write behind a candidate
    // Offers the items [first, last) of a panel's multiple on; ids must ascend from call to call.
    void (*scan)(const TopkScan&, std::int64_t first, std::int64_t last);
    // Drops what is excluded or cannot be among the best K of query b: at most K + K / 8 candidates remain.
    void (*compact)(const Candidates&, std::int64_t b);
    // The panels [first, last) of the items, one after the other.
    void (*pack)(const float* items, std::int64_t N, std::int64_t D, float* panels, std::int64_t first, std::int64_t last);
    // sorted = keys [n] in ascending order; they differ from each other. For small n: it compares all pairs.
    void (*sort_few)(const std::uint64_t* keys, std::int64_t n, std::uint64_t* sorted);
};

const TopkKernel* best_topk_kernel();

}  // namespace lares_fast
