#include "topk/topk_kernel.h"

#include "topk/candidates.h"
#include "topk/scores.h"

namespace lares_fast {
namespace {

// Offers R queries from b on one panel's items.
template <int R>
LARES_INLINE void offer(const Scan& s, std::int64_t b, const float* panel, const float* bias, std::int64_t first, std::int64_t items) {
    Vec sums[R][VECS];
    score_tile<R>(s.query + b * s.D, panel, bias, s.D, sums);
    unsigned hits = 0;
    for (int r = 0; r < R; ++r) {
        // A NaN in the first operand of max is lost, which drops the NaN itself; one in the second stays and counts as a hit.
        const Vec best = max(sums[r][2], max(sums[r][0], sums[r][1]));
        hits |= (not_less_equal(best, broadcast(s.best.threshold[b + r])) != 0) << r;
    }
    if (__builtin_expect(hits == 0, 1)) return;
    float lanes[R][PANEL];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < VECS; ++v) store(lanes[r] + v * W, sums[r][v]);
    }
    for (; hits; hits &= hits - 1) {
        const int r = __builtin_ctz(hits);
        take(s.best, b + r, lanes[r], static_cast<std::int32_t>(first), items);
    }
}

void scan(const Scan& s, std::int64_t first, std::int64_t last) {
    const std::int64_t floats = PANEL * s.D;
    float* const edge_bias = s.scratch + floats;
    for (std::int64_t item = first; item < last; item += PANEL) {
        const std::int64_t items = last - item < PANEL ? last - item : PANEL;
        const float* panel = s.scratch;
        if (s.panels) {
            panel = s.panels + item / PANEL * floats;
        } else {
            pack_panel(s.items + item * s.D, items, s.D, s.scratch);
        }
        const float* bias = s.bias ? s.bias + item : nullptr;
        if (bias && items < PANEL) {
            std::memcpy(edge_bias, bias, sizeof(float) * static_cast<std::size_t>(items));
            bias = edge_bias;
        }
        // The next panel comes from memory while this one is worked on.
        const char* ahead = reinterpret_cast<const char*>(s.panels ? panel + floats : s.items + (item + PANEL) * s.D);
        const char* const ahead_end = last - item >= 2 * PANEL ? ahead + sizeof(float) * static_cast<std::size_t>(floats) : ahead;
        std::int64_t b = 0;
        for (; b + ROWS <= s.B; b += ROWS) {
            for (int line = 0; line < 8 && ahead < ahead_end; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            offer<ROWS>(s, b, panel, bias, item, items);
        }
        if (ROWS > 4 && b + 4 <= s.B) offer<4>(s, b, panel, bias, item, items), b += 4;
        if (b + 2 <= s.B) offer<2>(s, b, panel, bias, item, items), b += 2;
        if (b < s.B) offer<1>(s, b, panel, bias, item, items);
    }
}

}  // namespace

namespace LARES_LEVEL {
extern const TopkKernel topk_kernel;
const TopkKernel topk_kernel{PANEL, ROWS, PANEL, scan, compact};
}  // namespace LARES_LEVEL

}  // namespace lares_fast
