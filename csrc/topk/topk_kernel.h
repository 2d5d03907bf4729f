// The part of top-K that is compiled once for each instruction set, and the state that it shares with
// csrc/topk/topk_cpu.cpp.
#pragma once

#include <cstdint>

#include "catalog/catalog.h"

namespace lares_fast {

// The candidates of a block of queries. The candidates of query b begin at b * stride, in ascending order of their ids.
struct Candidates {
    float* scores;
    std::int32_t* ids;
    std::int64_t* size;      // [B]
    std::int64_t* clean;     // [B]: the first `clean` candidates have been compared with the exclusions
    float* threshold;        // [B]: a score that does not beat it cannot be among the best K; NaN before K candidates are known
    const std::int64_t** excluded;      // [B]: the next one of the query's ascending exclusions, or null
    const std::int64_t** excluded_end;  // [B]
    std::int64_t stride;                // capacity and room for vector stores
    std::int64_t capacity;
    std::int64_t K;
};

struct TopkScan {
    Catalog catalog;
    const float* query;  // tiles of r queries, [D][r]; the tile whose first query is b begins at query + b * D
    std::int64_t B;
    float* scratch;      // [D][panel] and [panel], at the beginning of a cache line
    Candidates best;
};

struct TopkKernel {
    int panel;  // items of a panel
    int rows;   // queries of a tile; the last queries of a block are in tiles of 4, 2 and 1
    int slack;  // elements behind a candidate that vector stores may overwrite
    // Offers the items [first, last). `first` is a multiple of the panel, and ids must ascend from call to call.
    void (*scan)(const TopkScan&, std::int64_t first, std::int64_t last);
    // Drops the candidates of query b that are excluded or cannot be among the best K. At most K + K / 8 candidates remain.
    void (*compact)(const Candidates&, std::int64_t b);
    // Writes the panels [first, last) of the items, one after the other.
    void (*pack)(const float* items, std::int64_t N, std::int64_t D, float* panels, std::int64_t first, std::int64_t last);
    // Sorts `keys` [n], which all differ, in ascending order to `sorted`. It compares all pairs, so it is for small n.
    void (*sort_few)(const std::uint64_t* keys, std::int64_t n, std::uint64_t* sorted);
};

const TopkKernel* best_topk_kernel();

}  // namespace lares_fast
