#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "linear_cross_entropy/linear_cross_entropy_kernel.h"
#include "linear_cross_entropy/view.h"
#include "base/parallel.h"
#include "catalog/query_tiles.h"
#include "memory/aligned.h"

namespace lares_fast {
namespace {

constexpr std::int64_t BLOCK = 4096;  // rows whose d_hidden each part of the catalog adds to a buffer of its own
constexpr std::int64_t FEW = 64;      // rows of d_hidden that are added up at a time

// What the rows [first, first + B) bring to every part. d logprob / d s_j = scale ([j = target] - p_j), where
// p_j = 2^(base (s_j - reference)) exp(scale reference - lse): the last factor, the gradient's and the sign go into `factor`.
struct Rows {
    Rows(const TargetLogprobBackward& call, const SoftmaxView& view, const CrossEntropyKernel& kernel, std::int64_t first_row,
         std::int64_t B)
        : first(first_row), B(B), columns(kernel.columns), width((view.softmax.D + kernel.columns - 1) / kernel.columns * kernel.columns),
          query(query_tiles(view.softmax.hidden + first * view.softmax.D, B, view.softmax.D, kernel.rows)),
          weighted(static_cast<std::size_t>(B * width)) {
        const Softmax& s = view.softmax;
        for (std::int64_t b = 0; b < B; ++b) {
            const double lse = call.lse[first + b], gradient = s.scale * static_cast<double>(call.grad[first + b]);
            const float* hidden = s.hidden + (first + b) * s.D;
            const std::int64_t target = s.target[first + b];
            const double own = s.scale * static_cast<double>(kernel.score(hidden, s.items + target * s.D, s.D));
            const bool finite = std::isfinite(lse);
            const float near = finite ? static_cast<float>(lse / s.scale) : 0.0f;
            const double nan = std::numeric_limits<double>::quiet_NaN();
            reference.push_back(near);
            factor.push_back(static_cast<float>(finite ? -gradient * std::exp(s.scale * static_cast<double>(near) - lse) : nan));
            // 1 - p of the target, without the cancellation.
            own_factor.push_back(static_cast<float>(finite ? -gradient * std::expm1(own - lse) : nan));
            for (std::int64_t d = 0; d < s.D; ++d) weighted[place(b, d)] = factor.back() * hidden[d];
        }
        by_target.resize(static_cast<std::size_t>(B));
        std::iota(by_target.begin(), by_target.end(), first);
        std::stable_sort(by_target.begin(), by_target.end(), [&](std::int64_t a, std::int64_t b) { return s.target[a] < s.target[b]; });
    }

    // Of column d of row b in a matrix of panels, [width / columns][B][columns].
    std::size_t place(std::int64_t b, std::int64_t d) const {
        return static_cast<std::size_t>((d / columns * B + b) * columns + d % columns);
    }

    std::int64_t first, B, columns, width;
    std::vector<float> query, weighted;
    std::vector<float> reference, factor, own_factor;
    std::vector<std::int64_t> by_target;  // row numbers
};

}  // namespace

void target_logprob_backward_cpu(const TargetLogprobBackward& call, std::int64_t threads) {
    const CrossEntropyKernel& kernel = cross_entropy_kernel();
    const SoftmaxView view(call.softmax, threads, kernel.panel);
    const Softmax& s = view.softmax;
    const std::int64_t M = s.M, N = s.N, D = s.D;
    require(M == 0 || (call.grad && call.lse), "grad and lse must not be null pointers");
    float* const d_items = call.d_items ? call.d_items + (call.softmax.N - N) * D : nullptr;
    if (call.d_items) std::fill(call.d_items, M == 0 ? call.d_items + N * D : d_items, 0.0f);
    if (M == 0) return;

    for (std::int64_t first = 0; first < M; first += BLOCK) {
        const Rows rows(call, view, kernel, first, std::min(BLOCK, M - first));
        std::unique_ptr<float[]> d_hidden(call.d_hidden ? new float[static_cast<std::size_t>(view.parts * rows.B * rows.width)] : nullptr);
        std::atomic<std::int64_t> next{0};
        run_on_threads(std::min(threads, view.parts), [&] {
            const Scratch scratch = make_scratch(kernel.gradient_scratch(D, rows.width));
            for (std::int64_t part; (part = next.fetch_add(1)) < view.parts;) {
                const std::int64_t from = view.begin(part), to = view.begin(part + 1);
                GradientScan scan{};
                scan.items = s.items;
                scan.D = D;
                scan.width = rows.width;
                scan.query = rows.query.data();
                scan.weighted = rows.weighted.data();
                scan.reference = rows.reference.data();
                scan.target = s.target + first;
                scan.B = rows.B;
                scan.base = view.base;
                scan.d_items = d_items;
                scan.add = first > 0;
                scan.scratch = scratch.get();
                if (call.d_hidden) {
                    scan.d_hidden = d_hidden.get() + part * rows.B * rows.width;
                    std::fill_n(scan.d_hidden, rows.B * rows.width, 0.0f);
                }
                kernel.gradients(scan, from, to);
                if (!d_items) continue;
                auto row = std::lower_bound(rows.by_target.begin(), rows.by_target.end(), from,
                                            [&](std::int64_t m, std::int64_t item) { return s.target[m] < item; });
                for (; row != rows.by_target.end() && s.target[*row] < to; ++row) {
                    const float factor = rows.own_factor[static_cast<std::size_t>(*row - first)];
                    for (std::int64_t d = 0; d < D; ++d) d_items[s.target[*row] * D + d] += factor * s.hidden[*row * D + d];
                }
            }
        });
        if (!call.d_hidden) continue;
        std::atomic<std::int64_t> next_row{0};
        run_on_threads(std::min(threads, (rows.B + FEW - 1) / FEW), [&] {
            for (std::int64_t few; (few = FEW * next_row.fetch_add(1)) < rows.B;) {
                for (std::int64_t b = few; b < std::min(few + FEW, rows.B); ++b) {
                    float* out = call.d_hidden + (first + b) * D;
                    const float* own = s.items + s.target[first + b] * D;
                    std::fill_n(out, D, 0.0f);
                    for (std::int64_t part = 0; part < view.parts; ++part) {
                        const float* sums = d_hidden.get() + part * rows.B * rows.width;
                        for (std::int64_t d = 0; d < D; ++d) out[d] += sums[rows.place(b, d)];
                    }
                    const float factor = rows.factor[static_cast<std::size_t>(b)], own_factor = rows.own_factor[static_cast<std::size_t>(b)];
                    for (std::int64_t d = 0; d < D; ++d) out[d] = factor * out[d] + own_factor * own[d];
                }
            }
        });
    }
}

}  // namespace lares_fast
