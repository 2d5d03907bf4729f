// Screening by int8 products. Items that provably cannot beat the threshold are left out; the others are scored in fp32.
#pragma once

#include <cstdint>

#include "topk/index.h"
#include "topk/topk_kernel.h"

namespace lares_fast {

// How an instruction set codes items and queries.
struct Coding {
    int panel;           // items of a panel
    int group;           // codes that one step sums up
    int lane_bytes;      // bytes of a sum
    int offset;          // a query's code q is stored as q + offset
    int largest;         // largest absolute code of a query
    bool bounded_norms;  // whether |codes| of items and queries must not exceed code_norm(D)
};

// If the codes of items and queries have at most this norm, their products fit into 16 bits. That includes rounding to
// integers.
float code_norm(std::int64_t D);

// A block of queries in int8: q * scale is about step * code.
struct CodedView {
    const std::uint8_t* codes;  // tiles (query_tiles.h) of words of 4 bytes: a group, repeated until the word is full
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
    std::int32_t* waiting;  // [B]: how many survivors wait
    std::int32_t* limit;    // [B]: workspace
};

struct ScreenKernel {
    Coding coding;
    std::int64_t pending_stride;
    // Screens the panels of [first, last) until too many items survive. Returns the first item that was not screened.
    std::int64_t (*screen)(const Screen&, std::int64_t first, std::int64_t last);
    void (*build)(const float* items, std::int64_t N, std::int64_t D, const IndexTables& tables, std::int64_t first_panel,
                  std::int64_t last_panel);
};

// Null if the level in force has no byte products.
const ScreenKernel* best_screen_kernel();

}  // namespace lares_fast
