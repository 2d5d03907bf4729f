#include "recurrence_truth.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "random/philox.h"

namespace op_test {
namespace {

class Model {
public:
    Model(const Case& test, Truth& truth) : c_(test), to_(truth), D_(test.shape.D) {
        for (const Tensor& weight : c_.weights) weights_.emplace_back(weight.begin(), weight.end());
        std::int64_t row = 0;
        for (b_ = 0; b_ < c_.B; ++b_) {
            L_ = c_.length(b_), first_ = c_.offsets[place(b_)];
            row = forward_and_backward(row);
        }
    }

private:
    struct Norm {
        Rows xhat, inverse;
    };
    struct LayerStates {
        Rows x, query, key, value, probability, kept, context, middle, up, gelu, keep_middle, keep_out;
        Norm first, second;
    };
    struct StepStates {
        Rows h, joined;
        Norm norm;
        std::vector<LayerStates> layers;
    };

    // Writes the rows of the output from `row` on. Returns the first row of the next sequence.
    std::int64_t forward_and_backward(std::int64_t row) {
        const std::int64_t depth = c_.depth[place(b_)];
        const auto begin = c_.h.begin() + first_ * D_;
        Rows h(begin, begin + L_ * D_);
        std::vector<StepStates> steps;
        const bool tokens = c_.output == Output::tokens;
        const auto is_read = [&](std::int64_t step) { return c_.output == Output::steps || step + 1 == depth; };
        std::int64_t end = row;
        for (std::int64_t step = 0; step < depth; ++step) {
            steps.push_back(step_forward(h, step));
            if (!is_read(step)) continue;
            std::copy(tokens ? h.begin() : h.end() - D_, h.end(), to_.out.begin() + end * D_);
            end += tokens ? L_ : 1;
        }
        const std::int64_t next = end;
        Rows grad(h.size());
        for (std::int64_t step = depth - 1; step >= 0; --step) {
            if (is_read(step)) {
                end -= tokens ? L_ : 1;
                const std::int64_t from = tokens ? 0 : (L_ - 1) * D_;
                for (std::int64_t i = from; i < L_ * D_; ++i) grad[place(i)] += static_cast<double>(c_.out_grad[place(end * D_ + i - from)]);
            }
            step_backward(steps[place(step)], grad);
        }
        std::copy(grad.begin(), grad.end(), to_.h_grad.begin() + first_ * D_);
        return next;
    }

    StepStates step_forward(Rows& h, std::int64_t step) {
        StepStates s;
        s.h = h;
        if (c_.shape.adapter != Adapter::none) {
            s.joined = join(h);
            h = norm(c_.shape.adapter == Adapter::concat ? linear(s.joined, 0) : s.joined, c_.norm_weight(), s.norm);
        }
        for (std::int64_t layer = 0; layer < c_.shape.layers; ++layer) s.layers.push_back(layer_forward(h, step, layer));
        return s;
    }

    void step_backward(const StepStates& s, Rows& grad) {
        for (std::int64_t layer = c_.shape.layers - 1; layer >= 0; --layer) layer_backward(s.layers[place(layer)], grad, layer);
        if (c_.shape.adapter == Adapter::none) return;
        Rows joined = norm_backward(s.norm, c_.norm_weight(), grad);
        const bool concat = c_.shape.adapter == Adapter::concat;
        if (concat) joined = linear_backward(s.joined, 0, joined);
        for (std::int64_t m = 0; m < L_; ++m) {
            for (std::int64_t d = 0; d < D_; ++d) {
                const auto at = place(m * D_ + d), token = place((first_ + m) * D_ + d);
                const double g = concat ? 0.0 : joined[at];
                if (c_.shape.adapter == Adapter::linear) {
                    to_.weight_grads[0][0] += g * (s.h[at] - static_cast<double>(c_.pre[token])) * share() * (1 - share());
                }
                grad[at] = concat ? joined[place(m * 2 * D_ + d)] : share() * g;
                to_.pre_grad[token] += concat ? joined[place((m * 2 + 1) * D_ + d)] : (1 - share()) * g;
            }
        }
    }

    double share() const { return c_.shape.adapter == Adapter::linear ? 1 / (1 + std::exp(-weights_[0][0])) : 0.5; }

    // [L, D], with concat [L, 2 D].
    Rows join(const Rows& h) const {
        Rows joined;
        for (std::int64_t m = 0; m < L_; ++m) {
            const auto state = h.begin() + m * D_;
            const auto pre = c_.pre.begin() + (first_ + m) * D_;
            if (c_.shape.adapter == Adapter::concat) {
                joined.insert(joined.end(), state, state + D_);
                joined.insert(joined.end(), pre, pre + D_);
            } else {
                for (std::int64_t d = 0; d < D_; ++d) joined.push_back(share() * state[d] + (1 - share()) * static_cast<double>(pre[d]));
            }
        }
        return joined;
    }

    LayerStates layer_forward(Rows& x, std::int64_t step, std::int64_t layer) const {
        const std::size_t w = c_.layer_weight(layer);
        LayerStates s;
        s.x = x;
        s.query = linear(x, w + QUERY), s.key = linear(x, w + KEY), s.value = linear(x, w + VALUE);
        s.kept = attention_factors(step, layer);
        attend(s);
        s.keep_middle = hidden_factors(1, step, layer), s.keep_out = hidden_factors(2, step, layer);
        s.middle = norm(plus(linear(s.context, w + PROJECTION), s.keep_middle, x), w + NORM_1, s.first);
        s.up = linear(s.middle, w + UP);
        for (const double u : s.up) s.gelu.push_back(u * phi(u));
        x = norm(plus(linear(s.gelu, w + DOWN), s.keep_out, s.middle), w + NORM_2, s.second);
        return s;
    }

    // `grad` holds the gradient of the layer's output and receives the gradient of its input.
    void layer_backward(const LayerStates& s, Rows& grad, std::int64_t layer) {
        const std::size_t w = c_.layer_weight(layer);
        const auto dropped = [](const Rows& g, const Rows& factors) { return plus(g, factors, Rows(g.size())); };
        Rows residual = norm_backward(s.second, w + NORM_2, grad);
        Rows up = linear_backward(s.gelu, w + DOWN, dropped(residual, s.keep_out));
        for (std::size_t i = 0; i < up.size(); ++i) {
            const double u = s.up[i];
            up[i] *= phi(u) + u * std::exp(-u * u / 2) / std::sqrt(2 * std::acos(-1.0));
        }
        residual = norm_backward(s.first, w + NORM_1, plus(linear_backward(s.middle, w + UP, up), Rows(), residual));
        grad = plus(attend_backward(s, w, linear_backward(s.context, w + PROJECTION, dropped(residual, s.keep_middle))), Rows(), residual);
    }

    static double phi(double u) { return 0.5 * std::erfc(-u / std::sqrt(2.0)); }

    // x * factors + y. Empty factors are ones.
    static Rows plus(Rows x, const Rows& factors, const Rows& y) {
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = (factors.empty() ? x[i] : x[i] * factors[i]) + y[i];
        return x;
    }

    static double scale_of(std::uint32_t threshold) { return 1 / (1 - threshold / 65536.0); }

    lares_fast::MaskAddress address(std::uint32_t threshold, std::int64_t step, std::int64_t layer) const {
        return {c_.dropout.key, threshold, c_.dropout.first_step + step, layer, c_.rows.data() + b_};
    }

    Rows hidden_factors(std::int64_t site, std::int64_t step, std::int64_t layer) const {
        std::vector<std::uint8_t> keep(place(L_ * D_));
        const std::vector<std::int64_t> rows(place(L_), c_.rows[place(b_)]);
        std::vector<std::int64_t> positions(place(L_));
        std::iota(positions.begin(), positions.end(), 0);
        lares_fast::MaskAddress at = address(c_.dropout.hidden, step, layer);
        at.rows = rows.data();
        lares_fast::keep_hidden(at, positions.data(), site, L_, D_, keep.data());
        Rows factors;
        for (const std::uint8_t kept : keep) factors.push_back(kept * scale_of(c_.dropout.hidden));
        return factors;
    }

    Rows attention_factors(std::int64_t step, std::int64_t layer) const {
        std::vector<std::uint8_t> keep(place(c_.shape.H * L_ * L_));
        lares_fast::keep_attention(address(c_.dropout.attention, step, layer), 1, c_.shape.H, L_, keep.data());
        Rows factors;
        for (const std::uint8_t kept : keep) factors.push_back(kept * scale_of(c_.dropout.attention));
        return factors;
    }

    // Calls at(index of a probability, first column of the query, first column of the key) for every visible pair.
    template <class At>
    void for_pairs(const At& at) const {
        for (std::int64_t head = 0; head < c_.shape.H; ++head) {
            for (std::int64_t i = 0; i < L_; ++i) {
                for (std::int64_t j = 0; j <= i; ++j) {
                    at(place((head * L_ + i) * L_ + j), place(i * D_ + head * c_.shape.head()), place(j * D_ + head * c_.shape.head()));
                }
            }
        }
    }

    double dot(const Rows& x, std::size_t i, const Rows& y, std::size_t j) const {
        double sum = 0.0;
        for (std::size_t d = 0; d < place(c_.shape.head()); ++d) sum += x[i + d] * y[j + d];
        return sum;
    }

    void add(double factor, const Rows& x, std::size_t j, Rows& to, std::size_t i) const {
        for (std::size_t d = 0; d < place(c_.shape.head()); ++d) to[i + d] += factor * x[j + d];
    }

    double score_scale() const { return 1 / std::sqrt(static_cast<double>(c_.shape.head())); }

    void attend(LayerStates& s) const {
        s.probability.resize(s.kept.size());
        s.context.resize(s.x.size());
        for_pairs([&](std::size_t p, std::size_t i, std::size_t j) { s.probability[p] = score_scale() * dot(s.query, i, s.key, j); });
        for (std::int64_t row = 0; row < c_.shape.H * L_; ++row) {
            const auto begin = s.probability.begin() + row * L_, end = begin + row % L_ + 1;
            const double most = *std::max_element(begin, end);
            double total = 0.0;
            for (auto p = begin; p != end; ++p) total += *p = std::exp(*p - most);
            for (auto p = begin; p != end; ++p) *p /= total;
        }
        for_pairs([&](std::size_t p, std::size_t i, std::size_t j) { add(s.probability[p] * s.kept[p], s.value, j, s.context, i); });
    }

    Rows attend_backward(const LayerStates& s, std::size_t w, const Rows& context_grad) {
        Rows query(s.x.size()), key(s.x.size()), value(s.x.size()), grad(s.probability.size()), along(place(c_.shape.H * L_));
        for_pairs([&](std::size_t p, std::size_t i, std::size_t j) {
            grad[p] = s.kept[p] * dot(context_grad, i, s.value, j);
            along[p / place(L_)] += grad[p] * s.probability[p];
            add(s.probability[p] * s.kept[p], context_grad, i, value, j);
        });
        for_pairs([&](std::size_t p, std::size_t i, std::size_t j) {
            const double score = score_scale() * s.probability[p] * (grad[p] - along[p / place(L_)]);
            add(score, s.key, j, query, i);
            add(score, s.query, i, key, j);
        });
        const Rows x = plus(linear_backward(s.x, w + QUERY, query), Rows(), linear_backward(s.x, w + KEY, key));
        return plus(linear_backward(s.x, w + VALUE, value), Rows(), x);
    }

    // x W^T + b with the weights `w` and `w + 1`.
    Rows linear(const Rows& x, std::size_t w) const {
        const std::size_t out = weights_[w + 1].size(), in = weights_[w].size() / out;
        Rows y(place(L_) * out);
        for (std::size_t i = 0; i < y.size(); ++i) {
            const double *const row = x.data() + i / out * in, *const column = weights_[w].data() + i % out * in;
            y[i] = weights_[w + 1][i % out];
            for (std::size_t k = 0; k < in; ++k) y[i] += row[k] * column[k];
        }
        return y;
    }

    Rows linear_backward(const Rows& x, std::size_t w, const Rows& grad) {
        const std::size_t out = weights_[w + 1].size(), in = weights_[w].size() / out;
        Rows x_grad(x.size());
        for (std::size_t i = 0; i < grad.size(); ++i) {
            const std::size_t row = i / out * in, column = i % out * in;
            to_.weight_grads[w + 1][i % out] += grad[i];
            for (std::size_t k = 0; k < in; ++k) {
                x_grad[row + k] += grad[i] * weights_[w][column + k];
                to_.weight_grads[w][column + k] += grad[i] * x[row + k];
            }
        }
        return x_grad;
    }

    Rows norm(const Rows& x, std::size_t w, Norm& kept) const {
        Rows y(x.size());
        kept.xhat.resize(x.size());
        for (std::int64_t m = 0; m < L_; ++m) {
            double mean = 0.0, variance = 0.0;
            for (std::int64_t d = 0; d < D_; ++d) mean += x[place(m * D_ + d)] / static_cast<double>(D_);
            for (std::int64_t d = 0; d < D_; ++d) variance += std::pow(x[place(m * D_ + d)] - mean, 2) / static_cast<double>(D_);
            kept.inverse.push_back(1 / std::sqrt(variance + static_cast<double>(c_.eps)));
            for (std::int64_t d = 0; d < D_; ++d) {
                const auto at = place(m * D_ + d);
                kept.xhat[at] = (x[at] - mean) * kept.inverse.back();
                y[at] = kept.xhat[at] * weights_[w][place(d)] + weights_[w + 1][place(d)];
            }
        }
        return y;
    }

    Rows norm_backward(const Norm& kept, std::size_t w, const Rows& grad) {
        Rows x_grad(grad.size());
        for (std::int64_t m = 0; m < L_; ++m) {
            double mean = 0.0, slope = 0.0;
            for (std::int64_t d = 0; d < D_; ++d) {
                const auto at = place(m * D_ + d);
                to_.weight_grads[w][place(d)] += grad[at] * kept.xhat[at];
                to_.weight_grads[w + 1][place(d)] += grad[at];
                mean += grad[at] * weights_[w][place(d)] / static_cast<double>(D_);
                slope += grad[at] * weights_[w][place(d)] * kept.xhat[at] / static_cast<double>(D_);
            }
            for (std::int64_t d = 0; d < D_; ++d) {
                const auto at = place(m * D_ + d);
                x_grad[at] = (grad[at] * weights_[w][place(d)] - mean - kept.xhat[at] * slope) * kept.inverse[place(m)];
            }
        }
        return x_grad;
    }

    const Case& c_;
    Truth& to_;
    const std::int64_t D_;
    std::vector<Rows> weights_;
    std::int64_t b_ = 0, L_ = 0, first_ = 0;  // the current sequence
};

}  // namespace

Truth::Truth(const Case& c) : out(place(c.out_rows * c.shape.D)), h_grad(c.h.size()), pre_grad(c.pre.size()) {
    for (const Tensor& weight : c.weights) weight_grads.emplace_back(weight.size());
    Model(c, *this);
}

}  // namespace op_test
