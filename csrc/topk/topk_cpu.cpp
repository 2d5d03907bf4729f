#include "topk/topk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "base/parallel.h"
#include "catalog/checks.h"
#include "simd/dispatch.h"
#include "topk/selection.h"

namespace lares_fast {

LARES_DISPATCH(LARES_FLOAT_SETS, TopkKernel, topk_kernel)

namespace {

// Queries that share one pass over the catalog.
constexpr std::int64_t BLOCK_QUERIES = 1024;
// The most memory for the candidates of one block. A large K therefore takes smaller blocks.
constexpr std::int64_t CANDIDATE_BYTES = 16 << 20;
// The most items that a thread takes at a time, and the unit of that number: a multiple of every panel size.
constexpr std::int64_t TASK_ITEMS = 32768, TASK_UNIT = 96;
// First thresholds are guessed from a sample of at most SAMPLE items, and of at most one in SAMPLE_SPREAD items.
constexpr std::int64_t SAMPLE = 2048, SAMPLE_SPREAD = 12;
// Up to this many keys, comparing all pairs is faster than a sort.
constexpr std::size_t FEW_KEYS = 384;

void check_index(const Topk& t) {
    const IndexTables& index = t.index;
    if (!index.codes) return;
    const bool complete = index.centre && index.scale && index.panels && index.start && index.bounds;
    require(complete, "the tables of the index must not be null pointers");
    require(index_shape(t.N, t.D).coded_panels > 0, "an index of this size and SIMD level has no codes");
}

void check(const Topk& t, std::int64_t threads) {
    check_sizes(t.B, t.N, t.D, threads);
    require(t.k >= 1, "k must be at least 1");
    require(t.B <= SIZE_LIMIT / std::max<std::int64_t>(t.k, 1), "B * k is too large");
    if (t.B == 0) return;
    check_inputs(t.query, t.items, t.N, t.D);
    require(t.scores && t.ids, "the outputs must not be null pointers");
    check_index(t);
    check_exclude(t.exclude_offsets, t.exclude_ids, t.B, t.N);
}

// Guesses a threshold for each query from the scores of panels spread over the catalog. Very likely more than K items beat
// it. A wrong guess costs time only: a query with fewer than K results is answered again without a threshold.
std::vector<float> guess_thresholds(const QueryBlock& block) {
    const std::int64_t panel = block.kernel.panel, N = block.call.N;
    const std::int64_t panels = std::min(SAMPLE, N / SAMPLE_SPREAD) / panel;
    if (panels == 0) return {};
    std::int64_t most = 0;
    for (std::int64_t b = 0; b < block.B; ++b) most = std::max(most, block.excluded.count(block.rows[b]));
    // The number of the best K and of the excluded items that are in the sample is about Poisson.
    const double mean = static_cast<double>(block.K + most) * static_cast<double>(panels * panel) / static_cast<double>(N);
    const auto place = static_cast<std::int64_t>(std::ceil(mean + 3 * std::sqrt(mean) + 3));
    if (4 * place > panels * panel) return {};
    BlockSelection sample(block, place, {}, false);
    const std::int64_t step = N / panel / panels * panel;
    for (std::int64_t p = 0; p < panels; ++p) sample.add_items(p * step, p * step + panel);
    sample.finish();
    std::vector<float> thresholds;
    for (std::int64_t b = 0; b < block.B; ++b) {
        thresholds.push_back(std::nextafter(sample.threshold(b), -std::numeric_limits<float>::infinity()));
    }
    return thresholds;
}

void write_results(const QueryBlock& block, std::int64_t b, std::vector<std::uint64_t>& keys) {
    const std::int64_t k = block.call.k, row = block.rows[b];
    const std::int64_t found = std::min<std::int64_t>(k, static_cast<std::int64_t>(keys.size()));
    if (keys.size() <= FEW_KEYS) {
        const std::vector<std::uint64_t> unsorted = keys;
        block.kernel.sort_few(unsorted.data(), static_cast<std::int64_t>(unsorted.size()), keys.data());
    } else {
        std::sort(keys.begin(), keys.end());
    }
    float* scores = block.call.scores + row * k;
    std::int64_t* ids = block.call.ids + row * k;
    for (std::int64_t i = 0; i < found; ++i) {
        scores[i] = key_score(keys[static_cast<std::size_t>(i)]);
        ids[i] = key_id(keys[static_cast<std::size_t>(i)]);
    }
    std::fill(scores + found, scores + k, -std::numeric_limits<float>::infinity());
    std::fill(ids + found, ids + k, std::int64_t{-1});
}

// Answers the queries of `block`. Returns the queries that found fewer than K results because of `thresholds`; their outputs
// are not written.
std::vector<std::int64_t> answer(const QueryBlock& block, const std::vector<float>& thresholds, std::int64_t threads) {
    const std::int64_t N = block.call.N;
    // Each thread takes parts of the catalog with ascending ids. The order of results is total, so the parts do not matter.
    const std::int64_t part = std::max<std::int64_t>(std::min(TASK_ITEMS, N / threads) / TASK_UNIT, 1) * TASK_UNIT;
    const std::int64_t parts = (N + part - 1) / part;
    const std::int64_t workers = std::clamp<std::int64_t>(std::min(threads, parts), 1, MOST_THREADS);
    std::vector<std::unique_ptr<BlockSelection>> selections(static_cast<std::size_t>(workers));
    std::atomic<std::int64_t> next_selection{0}, next_part{0};
    run_on_threads(workers, [&] {
        auto& selection = selections[static_cast<std::size_t>(next_selection.fetch_add(1))];
        selection = std::make_unique<BlockSelection>(block, block.K, thresholds, true);
        for (std::int64_t p; (p = next_part.fetch_add(1)) < parts;) selection->add_items(p * part, std::min(N, (p + 1) * part));
        selection->finish();
    });
    std::vector<std::int64_t> failed;
    std::vector<std::uint64_t> keys;
    for (std::int64_t b = 0; b < block.B; ++b) {
        keys.clear();
        for (const auto& selection : selections) {
            if (selection) selection->append_keys(b, keys);
        }
        if (!thresholds.empty() && static_cast<std::int64_t>(keys.size()) < block.K) {
            failed.push_back(block.rows[b]);
        } else {
            write_results(block, b, keys);
        }
    }
    return failed;
}

}  // namespace

void topk_cpu(const Topk& call, std::int64_t threads) {
    check(call, threads);
    if (call.B == 0) return;
    const TopkKernel& kernel = *best_topk_kernel();
    const ScreenKernel* screen = call.index.codes && !call.bias ? best_screen_kernel() : nullptr;
    const SortedExclusions excluded(call);
    const std::int64_t K = std::min(call.k, call.N);
    const std::int64_t size =
        std::clamp<std::int64_t>(CANDIDATE_BYTES / BlockSelection::bytes_a_query(K, kernel), kernel.rows, BLOCK_QUERIES);
    for (std::int64_t first = 0; first < call.B; first += size) {
        std::vector<std::int64_t> rows(static_cast<std::size_t>(std::min(size, call.B - first)));
        std::iota(rows.begin(), rows.end(), first);
        const QueryBlock block(call, rows, K, excluded, kernel, screen);
        const std::vector<std::int64_t> failed = answer(block, guess_thresholds(block), threads);
        if (!failed.empty()) answer(QueryBlock(call, failed, K, excluded, kernel, screen), {}, threads);
    }
}

}  // namespace lares_fast
