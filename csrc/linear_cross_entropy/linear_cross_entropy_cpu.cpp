#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "base/parallel.h"
#include "catalog/query_tiles.h"
#include "linear_cross_entropy/linear_cross_entropy_kernel.h"
#include "linear_cross_entropy/softmax_view.h"
#include "memory/aligned.h"
#include "simd/dispatch.h"
#include "target_rank/rank_queries.h"

namespace lares_fast {

LARES_DISPATCH(LARES_FLOAT_SETS, CrossEntropyKernel, cross_entropy_kernel)

namespace {

// Rows that share one pass over a part of the catalog.
constexpr std::int64_t BLOCK_ROWS = 1024;
constexpr float LOWEST = -std::numeric_limits<float>::max();

// For each row, the sum of its terms over one part of the catalog. The target's term is left out.
struct PartialSums {
    std::vector<float> reference;
    std::vector<double> sum;
};

// A block of rows, with everything that its scans over the parts of the catalog have in common.
struct RowBlock {
    SumScan sums{};
    RankScan ranks{};
    std::unique_ptr<RankQueries> rank_queries;

    RowBlock(const TargetLogprob& call, const SoftmaxView& view, const std::vector<float>& query, std::int64_t first) {
        const Softmax& s = view.softmax;
        sums.catalog = {s.items, nullptr, nullptr, s.N, s.D};
        sums.query = query.data() + first * s.D;
        sums.B = std::min(BLOCK_ROWS, s.M - first);
        sums.target = s.target + first;
        sums.base = view.base;
        sums.base_rest = view.base_rest;
        if (!call.rank) return;
        ranks.catalog = sums.catalog;
        ranks.rows = s.hidden + first * s.D;
        ranks.query = sums.query;
        ranks.B = sums.B;
        ranks.target = sums.target;
        ranks.ties_by_id = call.ties_by_id;
        rank_queries = std::make_unique<RankQueries>(ranks, *best_rank_kernel());
    }
};

struct RowResult {
    double logprob;
    // The two numbers of lse.
    double origin, log_sum;
};

// Returns log(exp(a) + exp(b)).
double log_of_sum(double a, double b) {
    const double high = std::max(a, b), low = std::min(a, b);
    return std::isinf(high) ? high : high + std::log1p(std::exp(low - high));
}

// Joins the parts of row m. `own` is the target's score. Infinities and NaN give the results that logsumexp would give.
RowResult finish(const SoftmaxView& view, const std::vector<PartialSums>& parts, std::size_t m, float own) {
    const double scale = view.softmax.scale;
    float top = LOWEST;
    for (const PartialSums& part : parts) {
        if (!(part.reference[m] <= top) && top == top) top = part.reference[m];
    }
    const double origin = static_cast<double>(top);
    if (!std::isfinite(top)) return {scale * static_cast<double>(own) - origin, origin, 0.0};
    double others = 0.0;
    for (const PartialSums& part : parts) {
        others += part.sum[m] * std::exp(scale * (static_cast<double>(part.reference[m]) - origin));
    }
    // Logarithms of the sums, relative to the origin. Scores are subtracted before they are scaled, because the difference is
    // nearly exact, and a product of large scores is not.
    const double of_others = std::log(others), of_own = scale * (static_cast<double>(own) - origin);
    const double log_sum = log_of_sum(of_others, of_own);
    return {std::isfinite(own) ? 0.0 - log_of_sum(of_others - of_own, 0.0) : of_own - log_sum, origin, log_sum};
}

}  // namespace

void target_logprob_cpu(const TargetLogprob& call, std::int64_t threads) {
    const CrossEntropyKernel& kernel = *best_cross_entropy_kernel();
    const SoftmaxView view(call.softmax, threads, kernel.panel);
    const Softmax& s = view.softmax;
    const std::int64_t M = s.M, D = s.D;
    if (M == 0) return;
    require(call.logprob && call.lse, "the outputs must not be null pointers");

    const auto size = static_cast<std::size_t>(M);
    const std::vector<float> query = query_tiles(s.hidden, M, D, kernel.rows);
    std::vector<float> own(size), start(size);
    for (std::int64_t m = 0; m < M; ++m) {
        const float score = kernel.score(s.hidden + m * D, s.items + s.target[m] * D, D);
        own[static_cast<std::size_t>(m)] = score;
        // At first, sums are relative to the target's score.
        start[static_cast<std::size_t>(m)] = score < LOWEST ? LOWEST : score;
    }
    std::vector<RowBlock> blocks;
    for (std::int64_t first = 0; first < M; first += BLOCK_ROWS) blocks.emplace_back(call, view, query, first);
    std::vector<std::atomic<std::int64_t>> rank(call.rank ? size : 0);
    for (auto& count : rank) count.store(0);

    std::vector<PartialSums> parts(static_cast<std::size_t>(view.parts), {start, std::vector<double>(size)});
    const std::int64_t tasks = static_cast<std::int64_t>(blocks.size()) * view.parts;
    std::atomic<std::int64_t> next{0};
    run_on_threads(std::min(threads, tasks), [&] {
        const auto rows = static_cast<std::size_t>(std::min(BLOCK_ROWS, M));
        std::vector<float> limit(rows), now(rows);
        std::vector<std::int64_t> found(rows);
        const AlignedFloats lanes = aligned_floats(static_cast<std::int64_t>(rows) * MAX_LANES);
        const AlignedFloats scratch = aligned_floats(kernel.panel * (D + 1));
        for (std::int64_t task; (task = next.fetch_add(1)) < tasks;) {
            const std::int64_t part = task % view.parts, first = task / view.parts * BLOCK_ROWS;
            const RowBlock& block = blocks[static_cast<std::size_t>(task / view.parts)];
            PartialSums& mine = parts[static_cast<std::size_t>(part)];
            SumScan scan = block.sums;
            scan.reference = mine.reference.data() + first;
            scan.sum = mine.sum.data() + first;
            scan.limit = limit.data();
            scan.lanes = lanes.get();
            scan.scratch = scratch.get();
            RankScan ranks = block.ranks;
            if (call.rank) {
                std::fill(found.begin(), found.end(), 0);
                ranks.now = now.data();
                ranks.rank = found.data();
                scan.rank = &ranks;
            }
            kernel.sums(scan, view.begin(part), view.begin(part + 1));
            for (std::int64_t b = 0; call.rank && b < scan.B; ++b) {
                rank[static_cast<std::size_t>(first + b)] += found[static_cast<std::size_t>(b)];
            }
        }
    });
    for (std::size_t m = 0; m < size; ++m) {
        const RowResult row = finish(view, parts, m, own[m]);
        call.logprob[m] = static_cast<float>(row.logprob);
        call.lse[2 * m] = row.origin;
        call.lse[2 * m + 1] = row.log_sum;
        if (call.rank) call.rank[m] = rank[m];
    }
}

}  // namespace lares_fast
