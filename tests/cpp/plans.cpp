#include <numeric>

#include "catalog/plan.h"
#include "op_test.h"

namespace op_test {
namespace {

using lares_fast::DeviceLimits;
using lares_fast::ScanPlan;
using lares_fast::TopkPlan;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

// The sizes of a call, and a device like those of docs/install.md.
struct Case {
    std::int64_t B, N, D, k;
    DeviceLimits limits;

    explicit Case(Random& random)
        : B(size(random, 30)), N(size(random, 31)), D(size(random, 20)), k(random.between(1, lares_fast::TOPK_LIMIT)),
          limits{random.between(1, 300), random.one_of<std::int64_t>({101376, 166912, 232448}), 0} {
        limits.shared_a_multiprocessor = limits.shared_a_block + random.one_of<std::int64_t>({1024, 4096});
    }

    static std::int64_t size(Random& random, std::int64_t bits) {
        return random.between(1, std::int64_t{1} << random.between(0, bits - 1));
    }
};

void check(bool holds, const char* what) {
    if (!holds) fail(std::string("a plan is wrong: ") + what);
}

void compare(const Case& c, const ScanPlan& plan) {
    check(plan.query_tiles == divide_up(c.B, lares_fast::TILE_QUERIES), "query tiles");
    check(plan.item_tiles == divide_up(c.N, lares_fast::TILE_ITEMS), "item tiles");
    check(plan.chunks == divide_up(c.D, lares_fast::CHUNK), "chunks");
    check(plan.splits >= 1 && plan.splits <= 65535, "splits");
    check(plan.shared_bytes > 0 && plan.shared_bytes <= c.limits.shared_a_block, "shared memory");
}

void valid(Random& random, bool, std::int64_t) {
    const Case c(random);
    compare(c, lares_fast::plan_target_rank(c.B, c.N, c.D, c.limits));
    const TopkPlan plan = lares_fast::plan_topk(c.B, c.N, c.D, c.k, c.limits);
    compare(c, plan.scan);
    check(plan.sorted >= c.k && plan.sorted < c.k + lares_fast::WARP && plan.sorted % lares_fast::WARP == 0, "the sorted list");
    check(std::gcd(plan.stride, plan.scan.item_tiles) == 1, "the stride");
    check(plan.workspace_bytes / 8 / c.B >= plan.scan.splits * plan.sorted, "the workspace");
}

void invalid(Random& random) {
    Case c(random);
    constexpr std::int64_t HUGE_SIZE = std::int64_t{1} << 62;
    const std::int64_t bad = random.one_of<std::int64_t>({-1, -HUGE_SIZE, HUGE_SIZE});
    const bool of_topk = random.chance(0.5);
    switch (random.between(0, 5)) {
        case 0: c.B = bad; break;
        case 1: c.N = bad; break;
        case 2: c.D = bad; break;
        case 3: c.limits.multiprocessors = bad; break;
        case 4: c.limits.shared_a_block = random.one_of<std::int64_t>({-1, 0, -HUGE_SIZE}); break;
        default: (of_topk ? c.k : c.B) = random.one_of<std::int64_t>({0, of_topk ? 1025 : HUGE_SIZE, bad});
    }
    must_throw("a plan", "a wrong number", [&] {
        if (of_topk) lares_fast::plan_topk(c.B, c.N, c.D, c.k, c.limits);
        lares_fast::plan_target_rank(c.B, c.N, c.D, c.limits);
    });
}

}  // namespace

const OpTest plans{"plans", valid, invalid};

}  // namespace op_test
