#include "recurrence/plan.h"

#include <algorithm>
#include <numeric>

namespace lares_fast {
namespace {

// Tokens of a block: its activations stay in the L2 and L3 caches, and enough blocks are left to share among threads.
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
    for (const std::int64_t b : order) {
        const std::int64_t first = call.offsets[b], length = call.offsets[b + 1] - first;
        if (plan.pieces.empty() || plan.pieces.back().tokens + length > TARGET) {
            plan.pieces.push_back({static_cast<std::int64_t>(plan.sequences.size()), 0, 0, 0, plan.tape_rows});
        }
        Plan::Piece& piece = plan.pieces.back();
        const auto row = call.rows ? static_cast<std::uint32_t>(call.rows[b]) : 0;
        plan.sequences.push_back({first, piece.tokens, length, call.depth[b], out[static_cast<std::size_t>(b)], row});
        plan.tape_rows += length * call.depth[b] * call.shape.layers;
        // The last layer of a sequence's last step.
        if (call.output != Output::tokens) plan.tape_rows -= length - 1;
        piece.count += 1;
        piece.tokens += length;
        piece.longest = std::max(piece.longest, length);
        plan.tokens = std::max(plan.tokens, piece.tokens);
        plan.longest = std::max(plan.longest, piece.longest);
    }
    return plan;
}

}  // namespace lares_fast
