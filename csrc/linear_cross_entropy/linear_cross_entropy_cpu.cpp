#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "linear_cross_entropy/linear_cross_entropy_kernel.h"
#include "linear_cross_entropy/view.h"
#include "base/parallel.h"
#include "simd/dispatch.h"
#include "target_rank/rank_queries.h"
#include "catalog/query_tiles.h"
#include "memory/aligned.h"

namespace lares_fast {

LARES_DISPATCH(CrossEntropyKernel, cross_entropy_kernel)

namespace {

constexpr std::int64_t BLOCK = 1024;  // rows that share one walk over a part of the catalog
constexpr float LOWEST = -std::numeric_limits<float>::max();

// The sum of a row's terms, the target's left out, over one part of the catalog.
struct Partial {
    std::vector<float> reference;
    std::vector<double> sum;
};

struct Row {
    double logprob, lse;
};

// `own` is the target's score. Infinities and NaN take the way they would take through logsumexp.
Row finish(const SoftmaxView& view, const std::vector<Partial>& partials, std::size_t m, float own) {
    const double scale = view.softmax.scale, base = static_cast<double>(view.base), unit = view.unit();
    float top = LOWEST;
    for (const Partial& part : partials) {
        if (!(part.reference[m] <= top) && top == top) top = part.reference[m];
    }
    const double own_score = scale * static_cast<double>(own);
    if (!std::isfinite(top) || top == LOWEST) {
        const double lse = top == LOWEST ? -std::numeric_limits<double>::infinity() : static_cast<double>(top);
        return {own_score - lse, lse};
    }
    double others = 0.0;
    for (const Partial& part : partials) {
        others += part.sum[m] * std::exp2(base * (static_cast<double>(part.reference[m]) - static_cast<double>(top)));
    }
    // log2 of others / own.
    const double odds = std::log2(others) - base * (static_cast<double>(own) - static_cast<double>(top));
    const double ln2 = std::log(2.0);
    const double logprob = 0.0 - unit * (odds > 0 ? odds + std::log1p(std::exp2(-odds)) / ln2 : std::log1p(std::exp2(odds)) / ln2);
    const double lse = std::isfinite(own) ? own_score - logprob : scale * static_cast<double>(top) + unit * std::log2(others);
    return {logprob, lse};
}

}  // namespace

void target_logprob_cpu(const TargetLogprob& call, std::int64_t threads) {
    const CrossEntropyKernel& kernel = cross_entropy_kernel();
    const SoftmaxView view(call.softmax, threads, kernel.panel);
    const Softmax& s = view.softmax;
    const std::int64_t M = s.M, N = s.N, D = s.D;
    if (M == 0) return;
    require(call.logprob && call.lse, "the outputs must not be null pointers");

    const auto size = static_cast<std::size_t>(M);
    const std::vector<float> query = query_tiles(s.hidden, M, D, kernel.rows);
    std::vector<float> own(size), start(size);
    for (std::int64_t m = 0; m < M; ++m) {
        const float score = kernel.score(s.hidden + m * D, s.items + s.target[m] * D, D);
        own[static_cast<std::size_t>(m)] = score;
        // The sums are relative to the target's score at first.
        start[static_cast<std::size_t>(m)] = score < LOWEST ? LOWEST : score;
    }
    const std::int64_t blocks = (M + BLOCK - 1) / BLOCK;
    std::vector<RankScan> ranked;
    std::vector<std::unique_ptr<RankQueries>> rank_queries;
    std::vector<std::atomic<std::int64_t>> rank(call.rank ? size : 0);
    for (auto& count : rank) count.store(0);
    for (std::int64_t block = 0; call.rank && block < blocks; ++block) {
        const std::int64_t first = block * BLOCK;
        RankScan scan{};
        scan.catalog = {s.items, nullptr, nullptr, N, D};
        scan.rows = s.hidden + first * D;
        scan.query = query.data() + first * D;
        scan.B = std::min(BLOCK, M - first);
        scan.target = s.target + first;
        scan.ties_by_id = call.ties_by_id;
        rank_queries.push_back(std::make_unique<RankQueries>(scan, rank_kernel()));
        ranked.push_back(scan);
    }

    std::vector<Partial> partials(static_cast<std::size_t>(view.parts), {start, std::vector<double>(size)});
    std::atomic<std::int64_t> next{0};
    run_on_threads(std::min(threads, blocks * view.parts), [&] {
        const auto rows = static_cast<std::size_t>(std::min(BLOCK, M));
        std::vector<float> limit(rows), now(rows);
        std::vector<std::int64_t> found(rows);
        const Scratch lanes = make_scratch(static_cast<std::int64_t>(rows) * MOST_LANES), scratch = make_scratch(kernel.panel * (D + 1));
        for (std::int64_t task; (task = next.fetch_add(1)) < blocks * view.parts;) {
            const std::int64_t part = task % view.parts, block = task / view.parts, first = block * BLOCK;
            Partial& mine = partials[static_cast<std::size_t>(part)];
            SumScan scan{};
            scan.catalog = {s.items, nullptr, nullptr, N, D};
            scan.query = query.data() + first * D;
            scan.B = std::min(BLOCK, M - first);
            scan.target = s.target + first;
            scan.base = view.base;
            scan.reference = mine.reference.data() + first;
            scan.sum = mine.sum.data() + first;
            scan.limit = limit.data();
            scan.lanes = lanes.get();
            scan.scratch = scratch.get();
            RankScan ranks{};
            if (call.rank) {
                ranks = ranked[static_cast<std::size_t>(block)];
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
        const Row row = finish(view, partials, m, own[m]);
        call.logprob[m] = static_cast<float>(row.logprob);
        call.lse[m] = row.lse;
        if (call.rank) call.rank[m] = rank[m];
    }
}

}  // namespace lares_fast
