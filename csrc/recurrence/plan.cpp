#include "recurrence/plan.h"

#include <algorithm>
#include <numeric>

namespace lares_fast {
namespace {

// The target number of tokens of a block. Its activations stay in the L2 and L3 caches, and there are enough blocks for
// all threads.
constexpr std::int64_t TARGET = 168;

}  // namespace

Plan make_plan(const Recurrence& call) {
    std::vector<std::int64_t> order(static_cast<std::size_t>(call.B));
    std::iota(order.begin(), order.end(), std::int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return call.depth[a] > call.depth[b]; });
    std::vector<std::int64_t> out(order.size());
    std::int64_t steps = 0;
    for (std::int64_t b = 0; b < call.B; steps += call.depth[b++]) {
        out[static_cast<std::size_t>(b)] = call.output == Output::steps ? steps : call.output == Output::last ? b : call.offsets[b];
    }
    Plan plan{};
    const std::int64_t D = call.shape.D;
    std::vector<std::int64_t> first_rows;
    for (const std::int64_t b : order) {
        const std::int64_t first = call.offsets[b], length = call.offsets[b + 1] - first;
        if (plan.blocks.empty() || plan.blocks.back().tokens + length > TARGET) {
            plan.blocks.push_back({});
            first_rows.push_back(plan.tape_rows);
        }
        Block& block = plan.blocks.back();
        const auto row = call.rows ? static_cast<std::uint32_t>(call.rows[b]) : 0;
        plan.sequences.push_back({first, block.tokens, length, call.depth[b], out[static_cast<std::size_t>(b)], row});
        plan.tape_rows += length * call.depth[b] * call.shape.layers;
        // The last layer of a sequence's last step computes one token only.
        if (call.output != Output::tokens) plan.tape_rows -= length - 1;
        block.count += 1;
        block.tokens += length;
        block.longest = std::max(block.longest, length);
        plan.tokens = std::max(plan.tokens, block.tokens);
        plan.longest = std::max(plan.longest, block.longest);
    }
    const Sequence* sequences = plan.sequences.data();
    for (std::size_t i = 0; i < plan.blocks.size(); ++i) {
        Block& block = plan.blocks[i];
        block.sequences = sequences;
        sequences += block.count;
        if (!call.tape) continue;
        block.normal = call.tape + first_rows[i] * 2 * D;
        block.inverse = call.tape + plan.tape_rows * 2 * D + first_rows[i] * 2;
    }
    return plan;
}

}  // namespace lares_fast
