// Scores of queries and items, computed tile by tile in registers. Top-K, the target's rank and the cross entropy use them.
#pragma once

#include "base/constant.h"
#include "catalog/catalog.h"
#include "catalog/panel.h"

namespace lares_fast {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 8;
#else
constexpr int ROWS = 4;
#endif

// query [D][R], panel [D][PANEL], bias [PANEL] or null. Each sum starts with the bias and adds the products in the order of
// D. A score therefore has the same bits wherever it is computed.
template <int R>
LARES_INLINE void score_tile(const float* query, const float* panel, const float* bias, std::int64_t D, Vec (&sums)[R][VECS]) {
    for (int v = 0; v < VECS; ++v) {
        const Vec start = bias ? load(bias + v * W) : broadcast(0.0f);
        for (int r = 0; r < R; ++r) sums[r][v] = start;
    }
#pragma GCC unroll 4
    for (std::int64_t d = 0; d < D; ++d) {
        Vec item[VECS];
        for (int v = 0; v < VECS; ++v) item[v] = load(panel + d * PANEL + v * W);
        for (int r = 0; r < R; ++r) {
            const Vec q = broadcast(query[d * R + r]);
            for (int v = 0; v < VECS; ++v) sums[r][v] = fma(q, item[v], sums[r][v]);
        }
    }
}

// Like score_tile, but for a whole panel of items that is not transposed. With few queries, storing the transposed panel
// would cost more time than the sums.
template <int R>
LARES_INLINE void score_rows_tile(const float* query, const float* items, const float* bias, std::int64_t D, Vec (&sums)[R][VECS]) {
    for (int v = 0; v < VECS; ++v) {
        const float* rows = items + v * W * D;
        const float* ahead = rows + 2 * W * D;
        const Vec start = bias ? load(bias + v * W) : broadcast(0.0f);
        for (int r = 0; r < R; ++r) sums[r][v] = start;
        std::int64_t d = 0;
        for (; d + 4 <= D; d += 4) {
            for (int line = 0; line < W / 4; ++line, ahead += 16) __builtin_prefetch(ahead);
            Vec columns[4];
            transpose4([=](int r) { return rows + r * D + d; }, columns);
            for (int c = 0; c < 4; ++c) {
                for (int r = 0; r < R; ++r) sums[r][v] = fma(broadcast(query[(d + c) * R + r]), columns[c], sums[r][v]);
            }
        }
        for (; d < D; ++d) {
            const Vec column = gather([=](int r) { return rows + r * D + d; });
            for (int r = 0; r < R; ++r) sums[r][v] = fma(broadcast(query[d * R + r]), column, sums[r][v]);
        }
    }
}

// The scores of any W rows. They have the same bits as in score_tile.
template <class Rows>
LARES_INLINE Vec score_rows(const float* query, const Rows& rows, Vec sum, std::int64_t D) {
    std::int64_t d = 0;
    for (; d + 4 <= D; d += 4) {
        Vec columns[4];
        transpose4([&](int r) { return rows(r) + d; }, columns);
        for (int c = 0; c < 4; ++c) sum = fma(broadcast(query[d + c]), columns[c], sum);
    }
    for (; d < D; ++d) sum = fma(broadcast(query[d]), gather([&](int r) { return rows(r) + d; }), sum);
    return sum;
}

LARES_INLINE float score_one(const float* query, const float* row, float bias, std::int64_t D) {
    for (std::int64_t d = 0; d < D; ++d) bias = fma_lane(query[d], row[d], bias);
    return bias;
}

// Computes the scores of B queries (in the layout of query_tiles.h) with the items [first, last), panel by panel in
// ascending order. For each panel it calls `sink.panel(item, items)` once, and then `sink.take<R>(b, sums, item, exists)`
// for each tile of queries. `first` is the beginning of a panel; scratch holds PANEL * (D + 1) floats.
template <class Sink>
void for_each_panel(const Catalog& c, const float* query, std::int64_t B, std::int64_t first, std::int64_t last, float* scratch, Sink&& sink) {
    const std::int64_t D = c.D, floats = PANEL * D;
    const auto whole_rows = [&](auto rows) __attribute__((always_inline)) {
        constexpr int R = decltype(rows)::value;
        const Mask exists[VECS] = {ALL, ALL, ALL};
        for (; first + PANEL <= last; first += PANEL) {
            sink.panel(first, PANEL);
            Vec sums[R][VECS];
            score_rows_tile<R>(query, c.items + first * D, c.bias ? c.bias + first : nullptr, D, sums);
            sink.template take<R>(0, sums, first, exists);
        }
    };
    if (!c.panels) {
        if (B == 1) whole_rows(Constant<1>{});
        if (B == 2) whole_rows(Constant<2>{});
        if (B == 4) whole_rows(Constant<4>{});
        if (B == ROWS && ROWS > 4) whole_rows(Constant<ROWS>{});
    }
    const std::int64_t lines_a_tile = floats / 16 * ROWS / (B + 1) + 1;
    for (std::int64_t item = first; item < last; item += PANEL) {
        const std::int64_t items = last - item < PANEL ? last - item : PANEL;
        sink.panel(item, items);
        const float* panel = scratch;
        if (c.panels) {
            panel = c.panels + item / PANEL * floats;
        } else {
            pack_panel(c.items + item * D, items, D, scratch);
        }
        const float* bias = c.bias ? c.bias + item : nullptr;
        if (bias && items < PANEL) {
            std::memcpy(scratch + floats, bias, sizeof(float) * static_cast<std::size_t>(items));
            bias = scratch + floats;
        }
        Mask exists[VECS];
        for (int v = 0; v < VECS; ++v) exists[v] = first_lanes(items - v * W);
        // Fetches the next panel while this one is computed.
        const char* ahead = reinterpret_cast<const char*>(c.panels ? panel + floats : c.items + (item + PANEL) * D);
        const char* const ahead_end = last - item >= 2 * PANEL ? ahead + sizeof(float) * static_cast<std::size_t>(floats) : ahead;
        const auto tile = [&](auto rows, std::int64_t b) __attribute__((always_inline)) {
            constexpr int R = decltype(rows)::value;
            Vec sums[R][VECS];
            score_tile<R>(query + b * D, panel, bias, D, sums);
            sink.template take<R>(b, sums, item, exists);
        };
        std::int64_t b = 0;
        for (; b + ROWS <= B; b += ROWS) {
            for (std::int64_t line = 0; line < lines_a_tile && ahead < ahead_end; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            tile(Constant<ROWS>{}, b);
        }
        if (ROWS > 4 && b + 4 <= B) tile(Constant<4>{}, b), b += 4;
        if (b + 2 <= B) tile(Constant<2>{}, b), b += 2;
        if (b < B) tile(Constant<1>{}, b);
    }
}

}  // namespace
}  // namespace lares_fast
