#include "topk/index.h"

#include <atomic>

#include "parallel.h"
#include "simd/level.h"
#include "topk/checks.h"
#include "topk/screen_kernel.h"
#include "topk/topk_kernel.h"

namespace lares_fast {

#if defined(__x86_64__)
namespace avx512vnni {
extern const ScreenKernel screen_kernel;
}
const ScreenKernel* screen_kernel() { return has_vnni() ? &avx512vnni::screen_kernel : nullptr; }
#else
const ScreenKernel* screen_kernel() { return nullptr; }
#endif

namespace {

constexpr std::int64_t SCREENED_N = 65536;  // below, the fp32 scores that give the first threshold are most of the work
constexpr std::int64_t SCREENED_D = 512;    // the bound's own rounding is allowed for up to here
constexpr std::int64_t BATCH = 256;         // panels a thread takes at a time

}  // namespace

IndexShape index_shape(std::int64_t N, std::int64_t D) {
    check_sizes(0, N, D, 1);
    const std::int64_t panel = topk_kernel().panel;
    const bool screened = screen_kernel() && N >= SCREENED_N && D > 0 && D <= SCREENED_D;
    return {panel, (N + panel - 1) / panel, screened ? (D + 3) / 4 : 0};
}

void build_index(const float* items, std::int64_t N, std::int64_t D, const IndexTables& tables, std::int64_t threads) {
    check_sizes(0, N, D, threads);
    check_inputs(items, items, N, D);
    const IndexShape shape = index_shape(N, D);
    require(tables.panels || N * D == 0, "panels must not be a null pointer");
    require(!shape.words || (tables.centre && tables.codes && tables.start && tables.bounds), "the tables must not be null pointers");
    std::atomic<std::int64_t> next{0};
    const std::int64_t batches = (shape.panels + BATCH - 1) / BATCH;
    run_on_threads(std::max<std::int64_t>(1, std::min(threads, batches)), [&] {
        for (std::int64_t batch; (batch = next.fetch_add(1)) < batches;) {
            const std::int64_t first = batch * BATCH, last = std::min(shape.panels, first + BATCH);
            if (shape.words) {
                screen_kernel()->build(items, N, D, tables, first, last);
            } else {
                topk_kernel().pack(items, N, D, tables.panels, first, last);
            }
        }
    });
}

}  // namespace lares_fast
