#include "catalog/plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "catalog/checks.h"

namespace lares_fast {
namespace {

constexpr std::int64_t RESERVED = 1024;  // shared memory that a multiprocessor reserves for each block
constexpr std::int64_t QUERY_BYTES = std::int64_t{sizeof(float)} * TILE_QUERIES * CHUNK;
constexpr std::int64_t ITEM_BYTES = std::int64_t{sizeof(float)} * TILE_ITEMS * (CHUNK + 1);
constexpr std::int64_t WORD_BYTES = std::int64_t{sizeof(int)} * TILE_QUERIES;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return a / b + (a % b != 0); }

std::int64_t shared_bytes(std::int64_t query_chunks) { return query_chunks * QUERY_BYTES + 2 * ITEM_BYTES + WORD_BYTES; }

std::int64_t blocks_a_multiprocessor(std::int64_t bytes, const DeviceLimits& limits) {
    return bytes > limits.shared_a_block ? 0 : limits.shared_a_multiprocessor / (bytes + RESERVED);
}

// Returns a stride that is coprime with `tiles` and near its golden section, so that ascending scores reach the kernel in a
// mixed order.
std::int64_t mixing_stride(std::int64_t tiles) {
    std::int64_t stride = std::max<std::int64_t>(tiles * 618 / 1000, 1);
    while (std::gcd(stride, tiles) > 1) ++stride;
    return stride;
}

ScanPlan plan_scan(std::int64_t B, std::int64_t N, std::int64_t D, std::int64_t tiles_a_split, const DeviceLimits& limits) {
    require(B >= 1 && N >= 0 && D >= 0, "B must be at least 1, and N and D must not be negative");
    require(limits.multiprocessors >= 1 && limits.multiprocessors <= std::numeric_limits<std::int32_t>::max(),
            "the number of multiprocessors must be in 1..2^31 - 1");
    // Keys keep the inverted id in their lower half, and all zeros there mean "no item".
    require(N < std::numeric_limits<std::uint32_t>::max(), "N must stay below 2^32 - 1");
    const std::int64_t width = std::max<std::int64_t>(D, 1);
    require(width <= std::numeric_limits<std::int32_t>::max() - CHUNK, "D is too large");
    require(B <= std::numeric_limits<std::int32_t>::max() - TILE_QUERIES && B <= SIZE_LIMIT / width && N <= SIZE_LIMIT / width,
            "B * D or N * D is too large");

    ScanPlan plan{};
    plan.query_tiles = divide_up(B, TILE_QUERIES);
    plan.item_tiles = divide_up(N, TILE_ITEMS);
    plan.chunks = divide_up(width, CHUNK);
    plan.resident = plan.chunks <= 2 || blocks_a_multiprocessor(shared_bytes(plan.chunks), limits) >= 2;
    plan.shared_bytes = shared_bytes(plan.resident ? plan.chunks : 2);
    const std::int64_t blocks = blocks_a_multiprocessor(plan.shared_bytes, limits);
    if (blocks == 0) {
        throw std::invalid_argument("the kernel needs " + std::to_string(plan.shared_bytes) +
                                    " bytes of shared memory a block, and the device has " + std::to_string(limits.shared_a_block));
    }
    // This is the number of blocks that run at once. One more block would start only after another one has ended.
    const std::int64_t places = limits.multiprocessors * std::min<std::int64_t>(blocks, BLOCKS_A_MULTIPROCESSOR);
    // 65535 is the limit of a grid's second dimension.
    plan.splits = std::clamp<std::int64_t>(std::min(places / plan.query_tiles, plan.item_tiles / tiles_a_split), 1, 65535);
    return plan;
}

}  // namespace

ScanPlan plan_target_rank(std::int64_t B, std::int64_t N, std::int64_t D, const DeviceLimits& limits) {
    // Each split also scores the targets themselves, in two tiles a block.
    return plan_scan(B, N, D, 8, limits);
}

TopkPlan plan_topk(std::int64_t B, std::int64_t N, std::int64_t D, std::int64_t k, const DeviceLimits& limits) {
    require(k >= 1 && k <= TOPK_LIMIT, "k must be in 1..1024");
    TopkPlan plan{};
    plan.sorted = divide_up(k, WARP) * WARP;
    // A split that sees less than twice the length of its list drops hardly any item.
    plan.scan = plan_scan(B, N, D, std::max<std::int64_t>(4, divide_up(2 * plan.sorted, TILE_ITEMS)), limits);
    plan.stride = mixing_stride(std::max<std::int64_t>(plan.scan.item_tiles, 1));
    plan.step = plan.scan.splits * plan.stride % std::max<std::int64_t>(plan.scan.item_tiles, 1);
    plan.merge_warps = 1;
    while (plan.merge_warps < 16 && plan.merge_warps < plan.scan.splits) plan.merge_warps *= 2;
    // Thresholds [B], and a list with its queue for each split and query.
    const std::int64_t words = 1 + plan.scan.splits * (plan.sorted + QUEUE);
    require(B <= SIZE_LIMIT / words / 8, "B * k is too large");
    plan.workspace_bytes = 8 * B * words;
    return plan;
}

}  // namespace lares_fast
