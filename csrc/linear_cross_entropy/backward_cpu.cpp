#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "base/parallel.h"
#include "catalog/query_tiles.h"
#include "linear_cross_entropy/linear_cross_entropy_kernel.h"
#include "linear_cross_entropy/softmax_view.h"
#include "memory/aligned.h"

namespace lares_fast {
namespace {

// Rows of one block. Each part of the catalog adds the d_hidden of a block to a buffer of its own.
constexpr std::int64_t BLOCK_ROWS = 4096;
// A thread joins these buffers for this many rows at a time.
constexpr std::int64_t JOINED_ROWS = 64;
constexpr double HIGHEST = static_cast<double>(std::numeric_limits<float>::max());

float product(double factor, float x) { return static_cast<float>(factor * static_cast<double>(x)); }

// The rows [first, first + B) of the call, prepared for all parts of the catalog.
// d logprob / d s_j = scale ([j = target] - p_j), where p_j = exp(scale (s_j - reference)) exp(scale (reference - r) - log_sum),
// and r and log_sum are the two numbers of lse. The last factor, the row's gradient, the scale and the sign are multiplied into
// `factor`. Factors are fp64, because a small factor times a large row may be a number of fp32 where the factor is none.
struct RowBlock {
    RowBlock(const TargetLogprobBackward& call, const SoftmaxView& view, const CrossEntropyKernel& kernel, std::int64_t first_row)
        : first(first_row), B(std::min(BLOCK_ROWS, view.softmax.M - first)), columns(kernel.columns),
          width((view.softmax.D + kernel.columns - 1) / kernel.columns * kernel.columns),
          query(query_tiles(view.softmax.hidden + first * view.softmax.D, B, view.softmax.D, kernel.rows)),
          weighted(static_cast<std::size_t>(B * width)) {
        const Softmax& s = view.softmax;
        for (std::int64_t b = 0; b < B; ++b) {
            const double r = call.lse[2 * (first + b)], log_sum = call.lse[2 * (first + b) + 1];
            const double gradient = s.scale * static_cast<double>(call.grad[first + b]);
            const float* hidden = s.hidden + (first + b) * s.D;
            const std::int64_t target = s.target[first + b];
            const double own = static_cast<double>(kernel.score(hidden, s.items + target * s.D, s.D));
            const bool finite = std::isfinite(r) && std::isfinite(log_sum);
            // The score next to log-sum-exp. It is at least the highest score, so no power exceeds 1.
            const float near = finite ? static_cast<float>(std::min(r + log_sum / s.scale, HIGHEST)) : 0.0f;
            const double nan = std::numeric_limits<double>::quiet_NaN();
            reference.push_back(near);
            factor.push_back(finite ? -gradient * std::exp(s.scale * (static_cast<double>(near) - r) - log_sum) : nan);
            // 1 - p of the target, without cancellation.
            own_factor.push_back(finite ? -gradient * std::expm1(s.scale * (own - r) - log_sum) : nan);
            for (std::int64_t d = 0; d < s.D; ++d) weighted[place(b, d)] = product(factor.back(), hidden[d]);
        }
        by_target.resize(static_cast<std::size_t>(B));
        std::iota(by_target.begin(), by_target.end(), first);
        std::stable_sort(by_target.begin(), by_target.end(), [&](std::int64_t a, std::int64_t b) { return s.target[a] < s.target[b]; });
    }

    // The place of row b, column d in a matrix of panels, [width / columns][B][columns].
    std::size_t place(std::int64_t b, std::int64_t d) const {
        return static_cast<std::size_t>((d / columns * B + b) * columns + d % columns);
    }

    // Everything that the scans over the parts of the catalog have in common.
    GradientScan scan(const SoftmaxView& view) const {
        GradientScan scan{};
        scan.items = view.softmax.items;
        scan.D = view.softmax.D;
        scan.width = width;
        scan.query = query.data();
        scan.weighted = weighted.data();
        scan.reference = reference.data();
        scan.target = view.softmax.target + first;
        scan.B = B;
        scan.base = view.base;
        scan.base_rest = view.base_rest;
        scan.add = first > 0;
        return scan;
    }

    std::int64_t first, B, columns, width;
    std::vector<float> query, weighted, reference;
    std::vector<double> factor, own_factor;
    // The numbers of the rows in the order of their targets.
    std::vector<std::int64_t> by_target;
};

// Adds to `d_items` the targets' own terms for the targets in [from, to).
void add_own_terms(const RowBlock& block, const Softmax& s, std::int64_t from, std::int64_t to, float* d_items) {
    auto row = std::lower_bound(block.by_target.begin(), block.by_target.end(), from,
                                [&](std::int64_t m, std::int64_t item) { return s.target[m] < item; });
    for (; row != block.by_target.end() && s.target[*row] < to; ++row) {
        const double factor = block.own_factor[static_cast<std::size_t>(*row - block.first)];
        for (std::int64_t d = 0; d < s.D; ++d) d_items[s.target[*row] * s.D + d] += product(factor, s.hidden[*row * s.D + d]);
    }
}

// Computes d_hidden of row b of the block from the sums of the parts and the target's own term.
void join_row(const RowBlock& block, const SoftmaxView& view, const float* sums, std::int64_t b, float* out) {
    const Softmax& s = view.softmax;
    const float* own = s.items + s.target[block.first + b] * s.D;
    std::fill_n(out, s.D, 0.0f);
    for (std::int64_t part = 0; part < view.parts; ++part, sums += block.B * block.width) {
        for (std::int64_t d = 0; d < s.D; ++d) out[d] += sums[block.place(b, d)];
    }
    const double factor = block.factor[static_cast<std::size_t>(b)], own_factor = block.own_factor[static_cast<std::size_t>(b)];
    for (std::int64_t d = 0; d < s.D; ++d) {
        out[d] = static_cast<float>(factor * static_cast<double>(out[d]) + own_factor * static_cast<double>(own[d]));
    }
}

}  // namespace

void target_logprob_backward_cpu(const TargetLogprobBackward& call, std::int64_t threads) {
    const CrossEntropyKernel& kernel = *best_cross_entropy_kernel();
    const SoftmaxView view(call.softmax, threads, kernel.panel);
    const Softmax& s = view.softmax;
    const std::int64_t M = s.M, N = s.N, D = s.D;
    require(M == 0 || (call.grad && call.lse), "grad and lse must not be null pointers");
    float* const d_items = call.d_items ? call.d_items + (call.softmax.N - N) * D : nullptr;
    if (call.d_items) std::fill(call.d_items, M == 0 ? call.d_items + N * D : d_items, 0.0f);
    if (M == 0) return;

    for (std::int64_t first = 0; first < M; first += BLOCK_ROWS) {
        const RowBlock block(call, view, kernel, first);
        const std::int64_t floats = block.B * block.width;
        std::unique_ptr<float[]> d_hidden(call.d_hidden ? new float[static_cast<std::size_t>(view.parts * floats)] : nullptr);
        std::atomic<std::int64_t> next_part{0};
        run_on_threads(std::min(threads, view.parts), [&] {
            const AlignedFloats scratch = aligned_floats(kernel.gradient_scratch(D, block.width));
            GradientScan scan = block.scan(view);
            scan.d_items = d_items;
            scan.scratch = scratch.get();
            for (std::int64_t part; (part = next_part.fetch_add(1)) < view.parts;) {
                if (call.d_hidden) {
                    scan.d_hidden = d_hidden.get() + part * floats;
                    std::fill_n(scan.d_hidden, floats, 0.0f);
                }
                kernel.gradients(scan, view.begin(part), view.begin(part + 1));
                if (d_items) add_own_terms(block, s, view.begin(part), view.begin(part + 1), d_items);
            }
        });
        if (!call.d_hidden) continue;
        std::atomic<std::int64_t> next_rows{0};
        run_on_threads(std::min(threads, (block.B + JOINED_ROWS - 1) / JOINED_ROWS), [&] {
            for (std::int64_t from; (from = JOINED_ROWS * next_rows.fetch_add(1)) < block.B;) {
                for (std::int64_t b = from; b < std::min(from + JOINED_ROWS, block.B); ++b) {
                    join_row(block, view, d_hidden.get(), b, call.d_hidden + (first + b) * D);
                }
            }
        });
    }
}

}  // namespace lares_fast
