// Screening by int8 products: leaves out what provably cannot beat the threshold, and scores the rest in fp32.
#pragma once

#include <cstdint>

#include "topk/topk_kernel.h"

namespace lares_fast {

// A block of queries in int8: q is about scale * (code - 128).
struct ScreenQueries {
    const std::uint8_t* codes;  // tiles as of query_tiles.h, [words][r][4] each, beginning at b * words * 4
    const float* inverse;       // [B] 1 / scale
    const float* norm;          // [B] |q|
    const float* error;         // [B] |q - scale * (code - 128)|
    const float* centred;       // [B] q . centre
};

struct Screen {
    Scan scan;
    const float* rows;  // [B, D]: the queries
    const std::int8_t* codes;
    const std::int32_t* start;
    const float* bounds;
    std::int64_t words;
    ScreenQueries query;
    std::int32_t* pending;  // [B][pending_stride]: survivors that wait for their fp32 score
    std::int32_t* waiting;  // [B]: how many
};

struct ScreenKernel {
    std::int64_t pending_stride;
    // Screens the panels of [first, last) until too many items survive; returns the item up to which it came.
    std::int64_t (*screen)(const Screen&, std::int64_t first, std::int64_t last);
    void (*build)(const float* items, std::int64_t N, std::int64_t D, const struct IndexTables& tables, std::int64_t first_panel,
                  std::int64_t last_panel);
};

// Null where the CPU or the build has no AVX512_VNNI at the level in force.
const ScreenKernel* screen_kernel();

}  // namespace lares_fast
