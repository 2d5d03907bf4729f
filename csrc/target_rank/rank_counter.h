// Counts the items that outrank a target, as a sink of for_each_panel in catalog/scores.h.
#pragma once

#include "catalog/scores.h"
#include "target_rank/target_rank_kernel.h"

namespace lares_fast {
namespace {

constexpr float INFINITE = __builtin_inff();
constexpr float LEAST_NORMAL = 0x1p-126f;

// Returns the largest float below x, for finite x and +inf.
inline float below(float x) {
    std::int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = bits == 0 ? static_cast<std::int32_t>(0x80000001) : bits > 0 ? bits - 1 : bits + 1;
    float y;
    std::memcpy(&y, &bits, sizeof y);
    // If the thread reads subnormal numbers as zeros, no subnormal number is below zero.
    return y < x ? y : -LEAST_NORMAL;
}

inline Vec score_ids(const RankScan& s, std::int64_t b, const std::int64_t (&ids)[W]) {
    float bias[W] = {};
    for (int lane = 0; lane < W && s.catalog.bias; ++lane) bias[lane] = s.catalog.bias[ids[lane]];
    const Vec score = score_rows(s.rows + b * s.catalog.D, [&](int r) { return s.catalog.items + ids[r] * s.catalog.D; }, load(bias), s.catalog.D);
    return max(score, broadcast(-INFINITE));
}

// Counts the items in [first, target) whose score equals the score of the target of query b.
inline std::int64_t ties_before(const RankScan& s, std::int64_t b, std::int64_t first) {
    std::int64_t found = 0;
    const std::int64_t target = s.target[b];
    for (std::int64_t i = first; i < target; i += W) {
        std::int64_t ids[W];
        for (int lane = 0; lane < W; ++lane) ids[lane] = i + lane < target ? i + lane : target;
        const Mask lanes = target - i < W ? (1u << (target - i)) - 1 : ALL;
        found += count(equal(score_ids(s, b, ids), broadcast(s.own[b])) & lanes);
    }
    return found;
}

// An item before the target outranks it also with an equal score, so it must only beat the next float below the target's
// score. One comparison an item is therefore enough. Only the panel that holds the target is visited a second time.
struct RankCounter {
    const RankScan& s;
    const std::int64_t* crossing;  // the first query, by ascending target, whose target is still to come

    void panel(std::int64_t item, std::int64_t items) {
        for (; s.ties_by_id && crossing < s.order + s.B && s.target[*crossing] < item + items; ++crossing) {
            s.now[*crossing] = s.own[*crossing];
            s.rank[*crossing] += ties_before(s, *crossing, item);
        }
    }

    template <int R>
    LARES_INLINE void take(std::int64_t b, const Vec (&sums)[R][VECS], std::int64_t, const Mask (&exists)[VECS]) {
        for (int r = 0; r < R; ++r) {
            const Vec now = broadcast(s.now[b + r]);
            int found = 0;
            for (int v = 0; v < VECS; ++v) found += count(greater(sums[r][v], now) & exists[v]);
            s.rank[b + r] += found;
        }
    }
};

// Returns a counter for the items [first, last). `first` is a multiple of the panel.
inline RankCounter start_counting(const RankScan& s, std::int64_t first, std::int64_t last) {
    const std::int64_t* crossing = s.order;
    for (std::int64_t b = 0; b < s.B; ++b) {
        const bool ahead = s.ties_by_id && s.target[b] >= first;
        s.now[b] = ahead ? below(s.own[b]) : s.own[b];
        if (ahead && s.own[b] == -INFINITE) {
            // No float is below -inf. All items of the panels before the target's panel count.
            const std::int64_t own_panel = s.target[b] / PANEL * PANEL;
            s.rank[b] += (own_panel < last ? own_panel : last) - first;
            s.now[b] = INFINITE;
        }
        crossing += s.target[b] < first;
    }
    return {s, crossing};
}

}  // namespace
}  // namespace lares_fast
