#include "topk/index.h"

#include <atomic>
#include <cmath>

#include "base/parallel.h"
#include "catalog/checks.h"
#include "simd/dispatch.h"
#include "topk/screen_kernel.h"
#include "topk/topk_kernel.h"

namespace lares_fast {

LARES_DISPATCH(LARES_BYTE_SETS, ScreenKernel, screen_kernel)

float code_norm(std::int64_t D) {
    // Rounding moves a vector of codes by at most half of sqrt(D). The square of 180.5 leaves room below 2^15.
    return 180.5f - 0.5f * std::sqrt(static_cast<float>(D));
}

namespace {

constexpr std::int64_t SCREENED_N = 32768;  // screening gains little with fewer items
constexpr std::int64_t SCREENED_D = 512;    // the bound allows for its own rounding up to this width
constexpr std::int64_t BATCH = 256;         // panels that a thread takes at a time

}  // namespace

IndexShape index_shape(std::int64_t N, std::int64_t D) {
    check_sizes(0, N, D, 1);
    const std::int64_t panel = best_topk_kernel()->panel;
    IndexShape shape{panel, (N + panel - 1) / panel, 0, 0, 0, 0};
    if (!best_screen_kernel() || N < SCREENED_N || D == 0 || D > SCREENED_D) return shape;
    const Coding& coding = best_screen_kernel()->coding;
    shape.coded_panel = coding.panel;
    shape.coded_panels = (N + coding.panel - 1) / coding.panel;
    shape.code_bytes = (D + coding.group - 1) / coding.group * coding.group;
    shape.lane_bytes = coding.lane_bytes;
    return shape;
}

void build_index(const float* items, std::int64_t N, std::int64_t D, const IndexTables& tables, std::int64_t threads) {
    check_sizes(0, N, D, threads);
    require(items || N * D == 0, "items must not be a null pointer");
    const IndexShape shape = index_shape(N, D);
    const bool screened = shape.coded_panels > 0;
    require(tables.panels || N * D == 0, "panels must not be a null pointer");
    require(!screened || (tables.centre && tables.scale && tables.codes && tables.start && tables.bounds), "the tables must not be null pointers");
    const std::int64_t panels = screened ? shape.coded_panels : shape.panels;
    std::atomic<std::int64_t> next{0};
    const std::int64_t batches = (panels + BATCH - 1) / BATCH;
    run_on_threads(std::max<std::int64_t>(1, std::min(threads, batches)), [&] {
        for (std::int64_t batch; (batch = next.fetch_add(1)) < batches;) {
            const std::int64_t first = batch * BATCH, last = std::min(panels, first + BATCH);
            if (screened) {
                best_screen_kernel()->build(items, N, D, tables, first, last);
            } else {
                best_topk_kernel()->pack(items, N, D, tables.panels, first, last);
            }
        }
    });
}

}  // namespace lares_fast
