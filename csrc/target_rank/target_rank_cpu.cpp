#include "target_rank/target_rank.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "base/parallel.h"
#include "catalog/checks.h"
#include "catalog/exclusions.h"
#include "catalog/query_tiles.h"
#include "memory/aligned.h"
#include "simd/dispatch.h"
#include "target_rank/rank_queries.h"
#include "target_rank/target_rank_kernel.h"

namespace lares_fast {

LARES_DISPATCH(LARES_FLOAT_SETS, RankKernel, rank_kernel)

namespace {

constexpr std::int64_t BLOCK_QUERIES = 1024;   // queries that share one pass over the catalog
constexpr std::int64_t TASK_ITEMS = 32768;  // items that a thread takes at a time

void check(const TargetRank& t, std::int64_t threads) {
    check_sizes(t.B, t.N, t.D, threads);
    if (t.B == 0) return;
    check_inputs(t.query, t.items, t.N, t.D);
    require(t.target, "target must not be a null pointer");
    require(t.rank && t.rank_of_all, "the outputs must not be null pointers");
    for (std::int64_t b = 0; b < t.B; ++b) {
        require(t.target[b] >= 0 && t.target[b] < t.N, "target must be item ids in [0, N)");
    }
    check_exclude(t.exclude_offsets, t.exclude_ids, t.B, t.N);
}

// Ranks the queries [first, first + B) of the call.
void rank_block(const TargetRank& call, const SortedExclusions& excluded, std::int64_t first, std::int64_t B, std::int64_t threads) {
    const RankKernel& kernel = *best_rank_kernel();
    const std::vector<float> query = query_tiles(call.query + first * call.D, B, call.D, kernel.rows);
    const auto size = static_cast<std::size_t>(B);
    RankScan scan{};
    scan.catalog = {call.items, nullptr, call.bias, call.N, call.D};
    scan.rows = call.query + first * call.D;
    scan.query = query.data();
    scan.B = B;
    scan.target = call.target + first;
    scan.ties_by_id = call.ties_by_id;
    const RankQueries queries(scan, kernel);

    const std::int64_t chunk = TASK_ITEMS / kernel.panel * kernel.panel;
    const std::int64_t chunks = (call.N + chunk - 1) / chunk;
    std::atomic<std::int64_t> next{0};
    std::vector<std::atomic<std::int64_t>> total(size);
    for (auto& count : total) count.store(0);
    run_on_threads(std::min(threads, chunks), [&] {
        RankScan mine = scan;
        std::vector<float> now(size);
        std::vector<std::int64_t> rank(size);
        const AlignedFloats scratch = aligned_floats(kernel.panel * (call.D + 1));
        mine.now = now.data();
        mine.rank = rank.data();
        mine.scratch = scratch.get();
        for (std::int64_t c; (c = next.fetch_add(1)) < chunks;) kernel.scan(mine, c * chunk, std::min(call.N, (c + 1) * chunk));
        for (std::size_t b = 0; b < size; ++b) total[b] += rank[b];
    });
    for (std::int64_t b = 0; b < B; ++b) {
        std::int64_t rank = total[static_cast<std::size_t>(b)];
        if (call.exclude_offsets) {
            rank -= kernel.outranking(scan, b, excluded.begin(first + b), excluded.count(first + b));
        }
        call.rank_of_all[first + b] = total[static_cast<std::size_t>(b)];
        call.rank[first + b] = rank;
    }
}

}  // namespace

void target_rank_cpu(const TargetRank& call, std::int64_t threads) {
    check(call, threads);
    if (call.B == 0) return;
    const SortedExclusions excluded(call);
    for (std::int64_t first = 0; first < call.B; first += BLOCK_QUERIES) {
        rank_block(call, excluded, first, std::min(BLOCK_QUERIES, call.B - first), threads);
    }
}

}  // namespace lares_fast
