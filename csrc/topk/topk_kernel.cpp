#include "topk/topk_kernel.h"

#include "catalog/scores.h"
#include "topk/candidates.h"

namespace lares_fast {
namespace {

struct Select {
    const Candidates& best;

    void panel(std::int64_t, std::int64_t) const {}

    template <int R>
    LARES_INLINE void take(std::int64_t b, const Vec (&sums)[R][VECS], std::int64_t first, const Mask (&exists)[VECS]) const {
        unsigned hits = 0;
        for (int r = 0; r < R; ++r) {
            // The maximum drops a NaN in its first operand, so that this NaN is no hit. A NaN in the second operand stays
            // and counts as a hit.
            const Vec top = max(sums[r][2], max(sums[r][0], sums[r][1]));
            hits |= (not_less_equal(top, broadcast(best.threshold[b + r])) != 0) << r;
        }
        if (__builtin_expect(hits == 0, 1)) return;
        float lanes[R][PANEL];
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < VECS; ++v) store(lanes[r] + v * W, sums[r][v]);
        }
        for (; hits; hits &= hits - 1) {
            const int r = __builtin_ctz(hits);
            append(best, b + r, lanes[r], static_cast<std::int32_t>(first), exists);
        }
    }
};

void scan(const TopkScan& s, std::int64_t first, std::int64_t last) {
    for_each_panel(s.catalog, s.query, s.B, first, last, s.scratch, Select{s.best});
}

void pack(const float* items, std::int64_t N, std::int64_t D, float* panels, std::int64_t first, std::int64_t last) {
    for (std::int64_t p = first; p < last; ++p) {
        const std::int64_t left = N - p * PANEL;
        pack_panel(items + p * PANEL * D, left < PANEL ? left : PANEL, D, panels + p * PANEL * D);
    }
}

void sort_few(const std::uint64_t* keys, std::int64_t n, std::uint64_t* sorted) {
    for (std::int64_t i = 0; i < n; ++i) {
        std::uint64_t place = 0;
        for (std::int64_t j = 0; j < n; ++j) place += keys[j] < keys[i];
        sorted[place] = keys[i];
    }
}

}  // namespace

namespace LARES_INSTRUCTION_SET {
extern const TopkKernel topk_kernel;
const TopkKernel topk_kernel{PANEL, ROWS, PANEL, scan, compact, pack, sort_few};
}  // namespace LARES_INSTRUCTION_SET

}  // namespace lares_fast
