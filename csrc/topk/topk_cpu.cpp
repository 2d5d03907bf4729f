#include "topk/topk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "base/parallel.h"
#include "simd/dispatch.h"
#include "catalog/checks.h"
#include "topk/selection.h"

namespace lares_fast {

LARES_DISPATCH(TopkKernel, topk_kernel)

namespace {

constexpr std::int64_t BLOCK = 1024;                // queries that share one walk over the catalog
constexpr std::int64_t CANDIDATE_BYTES = 16 << 20;  // of one block, so that a large K takes smaller blocks
constexpr std::int64_t CHUNK = 32768;               // items a thread takes at a time, at most
constexpr std::int64_t UNIT = 96;                   // a multiple of every panel
constexpr std::int64_t SAMPLE = 2048;               // items whose scores suggest a first threshold: at most so many
constexpr std::int64_t SPREAD = 12;                 // and at most one in so many
constexpr std::size_t FEW = 384;                    // keys below which comparing all pairs beats a sort

void check(const Topk& t, std::int64_t threads) {
    check_sizes(t.B, t.N, t.D, threads);
    require(t.k >= 1, "k must be at least 1");
    require(t.B <= SIZE_LIMIT / std::max<std::int64_t>(t.k, 1), "B * k is too large");
    if (t.B == 0) return;
    check_inputs(t.query, t.items, t.N, t.D);
    require(t.scores && t.ids, "the outputs must not be null pointers");
    check_exclude(t.exclude_offsets, t.exclude_ids, t.B, t.N);
}

// A threshold for each query that more than K items very likely beat: from the scores of panels spread over the catalog.
// It only has to be likely, as a query with fewer than K results in the end is walked again without it.
std::vector<float> guess(const Walk::Work& work) {
    const std::int64_t panel = work.kernel.panel, N = work.call.N;
    const std::int64_t panels = std::min(SAMPLE, N / SPREAD) / panel;
    std::int64_t most = 0;
    for (std::int64_t b = 0; b < work.B; ++b) most = std::max(most, work.excluded.count(work.rows[b]));
    // About Poisson: of the best K and what is excluded, so many lie in the sample.
    const double mean = static_cast<double>(work.K + most) * static_cast<double>(panels * panel) / static_cast<double>(N);
    const auto place = static_cast<std::int64_t>(std::ceil(mean + 3 * std::sqrt(mean) + 3));
    if (4 * place > panels * panel) return {};
    Walk walk(work, place, {}, false);
    const std::int64_t step = N / panel / panels * panel;
    for (std::int64_t p = 0; p < panels; ++p) walk.items(p * step, p * step + panel);
    walk.finish();
    std::vector<float> thresholds;
    for (std::int64_t b = 0; b < work.B; ++b) thresholds.push_back(std::nextafter(walk.threshold(b), -std::numeric_limits<float>::infinity()));
    return thresholds;
}

void write(const Walk::Work& work, std::int64_t b, std::vector<std::uint64_t>& keys) {
    const std::int64_t k = work.call.k, row = work.rows[b];
    const std::int64_t found = std::min<std::int64_t>(k, static_cast<std::int64_t>(keys.size()));
    if (keys.size() <= FEW) {
        const std::vector<std::uint64_t> unsorted = keys;
        work.kernel.sort_few(unsorted.data(), static_cast<std::int64_t>(unsorted.size()), keys.data());
    } else {
        std::sort(keys.begin(), keys.end());
    }
    float* scores = work.call.scores + row * k;
    std::int64_t* ids = work.call.ids + row * k;
    for (std::int64_t i = 0; i < found; ++i) {
        scores[i] = key_score(keys[static_cast<std::size_t>(i)]);
        ids[i] = key_id(keys[static_cast<std::size_t>(i)]);
    }
    std::fill(scores + found, scores + k, -std::numeric_limits<float>::infinity());
    std::fill(ids + found, ids + k, std::int64_t{-1});
}

// Answers the queries of `work`, but for those, which it returns, that have fewer than K results because of `thresholds`.
std::vector<std::int64_t> answer(const Walk::Work& work, const std::vector<float>& thresholds, std::int64_t threads) {
    const std::int64_t N = work.call.N;
    // Threads share out the catalog: each walks ascending ids of its own, and the order of results is total.
    const std::int64_t chunk = std::max<std::int64_t>(std::min(CHUNK, N / threads) / UNIT, 1) * UNIT;
    const std::int64_t chunks = (N + chunk - 1) / chunk;
    const std::int64_t walkers = std::clamp<std::int64_t>(std::min(threads, chunks), 1, 1024);
    std::vector<std::unique_ptr<Walk>> walks(static_cast<std::size_t>(walkers));
    std::atomic<std::int64_t> next_walk{0}, next_chunk{0};
    run_on_threads(walkers, [&] {
        auto& walk = walks[static_cast<std::size_t>(next_walk.fetch_add(1))];
        walk = std::make_unique<Walk>(work, work.K, thresholds, true);
        for (std::int64_t c; (c = next_chunk.fetch_add(1)) < chunks;) walk->items(c * chunk, std::min(N, (c + 1) * chunk));
        walk->finish();
    });
    std::vector<std::int64_t> failed;
    std::vector<std::uint64_t> keys;
    for (std::int64_t b = 0; b < work.B; ++b) {
        keys.clear();
        for (const auto& walk : walks) {
            if (walk) walk->keys(b, keys);
        }
        if (!thresholds.empty() && static_cast<std::int64_t>(keys.size()) < work.K) {
            failed.push_back(work.rows[b]);
        } else {
            write(work, b, keys);
        }
    }
    return failed;
}

}  // namespace

void topk_cpu(const Topk& call, std::int64_t threads) {
    check(call, threads);
    if (call.B == 0) return;
    const TopkKernel& kernel = topk_kernel();
    const ScreenKernel* screen = call.index.codes && !call.bias ? screen_kernel() : nullptr;
    const SortedExclusions excluded(call);
    const std::int64_t K = std::min(call.k, call.N);
    const std::int64_t block = std::clamp<std::int64_t>(CANDIDATE_BYTES / Walk::bytes_a_query(K, kernel), kernel.rows, BLOCK);
    for (std::int64_t first = 0; first < call.B; first += block) {
        std::vector<std::int64_t> rows(static_cast<std::size_t>(std::min(block, call.B - first)));
        std::iota(rows.begin(), rows.end(), first);
        const Walk::Work work(call, rows, K, excluded, kernel, screen);
        const std::vector<std::int64_t> failed = answer(work, guess(work), threads);
        if (!failed.empty()) answer(Walk::Work(call, failed, K, excluded, kernel, screen), {}, threads);
    }
}

}  // namespace lares_fast
