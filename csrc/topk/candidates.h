// The candidates of a query. Items that beat the threshold are appended. A full buffer is reduced to about K candidates.
#pragma once

#include <limits>

#include "catalog/panel.h"
#include "topk/topk_kernel.h"

namespace lares_fast {
namespace {

constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// Floats as integers of the same order (-0 is just below 0), so that a bisection always ends.
LARES_INLINE std::int32_t ordered(float x) {
    std::int32_t i;
    std::memcpy(&i, &x, sizeof i);
    return i ^ ((i >> 31) & 0x7fffffff);
}

LARES_INLINE float from_ordered(std::int32_t i) {
    i ^= (i >> 31) & 0x7fffffff;
    float x;
    std::memcpy(&x, &i, sizeof x);
    return x;
}

inline std::int64_t count_from(const float* scores, std::int64_t n, float t) {
    const Vec least = broadcast(t);
    std::int64_t found = 0;
    std::int64_t i = 0;
    for (; i + W <= n; i += W) found += count(greater_equal(load(scores + i), least));
    if (i < n) found += count(greater_equal(load(scores + i), least) & first_lanes(n - i));
    return found;
}

inline void drop_excluded(const Candidates& c, std::int64_t b) {
    float* scores = c.scores + b * c.stride;
    std::int32_t* ids = c.ids + b * c.stride;
    const std::int64_t* next = c.excluded[b];
    const std::int64_t* const end = c.excluded_end[b];
    std::int64_t to = c.clean[b];
    for (std::int64_t from = to; from < c.size[b]; ++from) {
        while (next != end && *next < ids[from]) ++next;
        if (next != end && *next == ids[from]) continue;
        scores[to] = scores[from];
        ids[to++] = ids[from];
    }
    c.excluded[b] = next;
    c.size[b] = to;
}

// Keeps the candidates above t, and the first `ties` of the candidates equal to t. The order does not change.
inline std::int64_t keep(float* scores, std::int32_t* ids, std::int64_t n, float t, std::int64_t ties) {
    std::int64_t to = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const float score = scores[i];
        if (!(score > t)) {
            if (!(score == t) || ties == 0) continue;
            --ties;
        }
        scores[to] = score;
        ids[to++] = ids[i];
    }
    return to;
}

// Keeps the candidates that are at least t. The order does not change.
inline std::int64_t keep_from(float* scores, std::int32_t* ids, std::int64_t n, float t) {
    std::int64_t to = 0;
    const Vec least = broadcast(t);
    for (std::int64_t i = 0; i < n; i += W) {
        const Vec score = load(scores + i);
        const Mask mask = greater_equal(score, least) & first_lanes(n - i);
        compress_ids(ids + to, mask, ids + i);
        compress(scores + to, mask, score);
        to += count(mask);
    }
    return to;
}

inline void compact(const Candidates& c, std::int64_t b) {
    if (c.excluded) drop_excluded(c, b);
    float* scores = c.scores + b * c.stride;
    std::int32_t* ids = c.ids + b * c.stride;
    const std::int64_t n = c.size[b], K = c.K;
    if (n >= K) {
        // Always count(>= low) >= K and count(>= high) < K. At first `high` is just above the best score.
        Vec worst = broadcast(scores[0]), best = worst;
        std::int64_t i = 0;
        for (; i + W <= n; i += W) {
            worst = min(load(scores + i), worst);
            best = max(load(scores + i), best);
        }
        float lows[W], highs[W];
        store(lows, worst);
        store(highs, best);
        for (int lane = 1; lane < W; ++lane) {
            lows[0] = lows[lane] < lows[0] ? lows[lane] : lows[0];
            highs[0] = highs[lane] > highs[0] ? highs[lane] : highs[0];
        }
        for (; i < n; ++i) {
            lows[0] = scores[i] < lows[0] ? scores[i] : lows[0];
            highs[0] = scores[i] > highs[0] ? scores[i] : highs[0];
        }
        std::int64_t low = ordered(lows[0]), high = std::int64_t{ordered(highs[0])} + 1;
        std::int64_t at_low = n;
        while (at_low > K + K / 8 && high - low > 1) {
            const std::int64_t middle = low + (high - low) / 2;
            const std::int64_t found = count_from(scores, n, from_ordered(static_cast<std::int32_t>(middle)));
            if (found >= K) {
                low = middle;
                at_low = found;
            } else {
                high = middle;
            }
        }
        const float t = from_ordered(static_cast<std::int32_t>(low));
        if (at_low > K + K / 8) {
            // Very many candidates are equal to t. The first of them win.
            std::int64_t above = 0;
            for (std::int64_t j = 0; j < n; ++j) above += scores[j] > t;
            c.size[b] = keep(scores, ids, n, t, K - above);
        } else if (at_low < n) {
            c.size[b] = keep_from(scores, ids, n, t);
        }
        c.threshold[b] = t;
    }
    c.clean[b] = c.size[b];
}

// Appends the items that beat the threshold, out of PANEL consecutive items from `first` on. `exists` has one mask a
// vector. There is no branch on the values of a vector, because half of such branches would be predicted wrongly.
inline void append(const Candidates& c, std::int64_t b, const float* lanes, std::int32_t first, const Mask (&exists)[VECS]) {
    const Vec t = broadcast(c.threshold[b]);
    float* scores = c.scores + b * c.stride;
    std::int32_t* ids = c.ids + b * c.stride;
    std::int64_t n = c.size[b];
    for (int v = 0; v < VECS; ++v) {
        // If the first operand is NaN, the maximum is the second operand.
        const Vec score = max(load(lanes + v * W), broadcast(LOWEST));
        const Mask mask = not_less_equal(score, t) & exists[v];
        compress(scores + n, mask, score);
        compress_ids(ids + n, mask, first + v * W);
        n += count(mask);
    }
    c.size[b] = n;
    if (n + PANEL > c.capacity) compact(c, b);
}

}  // namespace
}  // namespace lares_fast
