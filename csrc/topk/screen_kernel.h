// Screening by int8 products: leaves out what provably cannot beat the threshold, and scores the rest in fp32.
#pragma once

#include <cstdint>

#include "topk/index.h"
#include "topk/topk_kernel.h"

namespace lares_fast {

// How a level codes.
struct Coding {
    int panel;           // items a panel
    int group;           // codes that one step sums up
    int lane_bytes;      // of a sum
    int offset;          // a query's code q is stored as q + offset
    int largest;         // of a query's codes
    bool bounded_norms;  // whether |codes| of items and queries must not exceed code_norm(D)
};

// Products of codes with these norms fit 16 bits, their rounding to integers included.
float code_norm(std::int64_t D);

// A block of queries in int8: q * scale is about step * code.
struct CodedView {
    const std::uint8_t* codes;  // tiles as of query_tiles.h of words of 4 bytes: a group, repeated to fill it
    const float* inverse;       // [B] 1 / step
    const float* norm;          // [B] |q|
    const float* scaled;        // [B] |q * scale|
    const float* error;         // [B] |q * scale - step * code|
    const float* centred;       // [B] q . centre
};

struct Screen {
    TopkScan scan;
    const float* rows;  // [B, D]: the queries
    IndexTables index;
    CodedView query;
    std::int32_t* pending;  // [B][pending_stride]: survivors that wait for their fp32 score
    std::int32_t* waiting;  // [B]: how many
    std::int32_t* limit;    // [B]: workspace
};

struct ScreenKernel {
    Coding coding;
    std::int64_t pending_stride;
    // Screens the panels of [first, last) until too many items survive; returns the item up to which it came.
    std::int64_t (*screen)(const Screen&, std::int64_t first, std::int64_t last);
    void (*build)(const float* items, std::int64_t N, std::int64_t D, const IndexTables& tables, std::int64_t first_panel,
                  std::int64_t last_panel);
};

// Null where the level in force has no byte products.
const ScreenKernel* best_screen_kernel();

}  // namespace lares_fast
