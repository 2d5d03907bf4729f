// Scores of a tile of R queries against one panel of items: the inner loop of top-K and of the target's rank.
#pragma once

#include "simd/panel.h"

namespace lares_fast {
namespace {

#if defined(__AVX512F__)
constexpr int ROWS = 8;
#else
constexpr int ROWS = 4;
#endif

// query [D][R], panel [D][PANEL], bias [PANEL] or null. Every sum starts at the bias and adds one product after the other
// in the order of D, so a score has the same bits wherever it is computed.
template <int R>
LARES_INLINE void score_tile(const float* query, const float* panel, const float* bias, std::int64_t D, Vec (&sums)[R][VECS]) {
    for (int v = 0; v < VECS; ++v) {
        const Vec start = bias ? load(bias + v * W) : broadcast(0.0f);
        for (int r = 0; r < R; ++r) sums[r][v] = start;
    }
    for (std::int64_t d = 0; d < D; ++d) {
        Vec item[VECS];
        for (int v = 0; v < VECS; ++v) item[v] = load(panel + d * PANEL + v * W);
        for (int r = 0; r < R; ++r) {
            const Vec q = broadcast(query[d * R + r]);
            for (int v = 0; v < VECS; ++v) sums[r][v] = fma(q, item[v], sums[r][v]);
        }
    }
}

// The score of W rows of any place, with the bits of `score_tile`.
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

}  // namespace
}  // namespace lares_fast
