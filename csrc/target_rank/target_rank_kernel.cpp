#include "target_rank/target_rank_kernel.h"

#include "target_rank/rank_counter.h"

namespace lares_fast {
namespace {

// Adding 0 gives -0 and 0 the same bits. A NaN ranks as -inf.
float own_score(const RankScan& s, std::int64_t b) {
    const std::int64_t target = s.target[b];
    const float bias = s.catalog.bias ? s.catalog.bias[target] : 0.0f;
    const float score = score_one(s.rows + b * s.catalog.D, s.catalog.items + target * s.catalog.D, bias, s.catalog.D) + 0.0f;
    return score == score ? score : -INFINITE;
}

std::int64_t outranking(const RankScan& s, std::int64_t b, const std::int64_t* from, std::int64_t n) {
    std::int64_t found = 0;
    const Vec own = broadcast(s.own[b]);
    for (std::int64_t i = 0; i < n; i += W) {
        std::int64_t ids[W];
        Mask before = 0, others = 0;
        for (int lane = 0; lane < W; ++lane) {
            ids[lane] = from[i + lane < n ? i + lane : n - 1];
            before |= static_cast<Mask>(i + lane < n && ids[lane] < s.target[b]) << lane;
            others |= static_cast<Mask>(i + lane < n && ids[lane] != s.target[b]) << lane;
        }
        const Vec score = score_ids(s, b, ids);
        found += count(greater(score, own) & others);
        if (s.ties_by_id) found += count(equal(score, own) & before);
    }
    return found;
}

void scan(const RankScan& s, std::int64_t first, std::int64_t last) {
    for_each_panel(s.catalog, s.query, s.B, first, last, s.scratch, start_counting(s, first, last));
}

}  // namespace

namespace LARES_INSTRUCTION_SET {
extern const RankKernel rank_kernel;
const RankKernel rank_kernel{PANEL, ROWS, own_score, scan, outranking};
}  // namespace LARES_INSTRUCTION_SET

}  // namespace lares_fast
