#include "recurrence/recurrence.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>

#include "op_test.h"
#include "random/philox.h"

namespace op_test {
namespace {

using lares_fast::Adapter;
using lares_fast::Recurrence;
using Output = lares_fast::Output;
using Rows = std::vector<double>;  // a matrix row by row, or a vector
using Tensor = std::vector<float>;

std::size_t place(std::int64_t i) { return static_cast<std::size_t>(i); }

// The ceiling of tests/oracle.py, of the larger of rms and a sixteenth of the largest value.
constexpr double CEILING = 1e-4;
// What outputs hold before a call.
constexpr float UNTOUCHED = 7.0f;

// Weights of one norm or layer, one behind the other, as the reference orders its parameters.
enum Layer { QUERY = 0, KEY = 2, VALUE = 4, PROJECTION = 6, NORM_1 = 8, UP = 10, DOWN = 12, NORM_2 = 14, LAYER_WEIGHTS = 16 };

struct Case {
    lares_fast::Shape shape{};
    Output output{};
    float eps = 0.0f;
    lares_fast::Dropout dropout{};
    std::int64_t B = 0, P = 0, out_rows = 0, tape_rows = 0;
    std::vector<std::int64_t> offsets{0}, depth, rows;
    Tensor h, pre, out_grad;
    std::vector<Tensor> weights;

    Case(Random& random, bool large) {
        const auto one_of = [&](std::vector<std::int64_t> sizes) { return random.one_of<std::int64_t>(sizes); };
        const bool wide = large || random.chance(0.03);
        do {
            const std::int64_t D = 16 * random.between(1, wide ? 16 : 3), I = 16 * random.between(1, wide ? 20 : 3);
            const std::int64_t H = one_of({1, 2, 4, D / 16, D / 8, D});
            shape = {D, D % H ? 2 : H, I, random.between(1, 3), static_cast<Adapter>(random.between(0, 3))};
            B = large ? random.between(1, 40) : random.between(0, 5);
            offsets.resize(1), depth.clear();
            const bool same = random.chance(0.3), longest = large && random.chance(0.3);
            const std::int64_t steps = random.between(1, 4);
            for (std::int64_t b = 0; b < B; ++b) {
                const std::int64_t any = one_of({1, 2, 3, 4, 5, 6, 7, 12, 15, 16, 17, 33, large ? random.between(1, 180) : 9});
                offsets.push_back(offsets.back() + (longest && b == 0 ? random.between(500, 512) : any));
                depth.push_back(same ? steps : random.between(1, steps));
            }
        } while (work() > (large ? 1'000'000 : wide ? 80'000 : 12'000));
        offsets.shrink_to_fit(), depth.shrink_to_fit();
        output = static_cast<Output>(random.between(0, 2));
        eps = random.one_of<float>({1e-12f, 1e-5f});
        const auto threshold = [&] { return static_cast<std::uint32_t>(one_of({0, 6554, 32768})); };
        const auto word = [&] { return static_cast<std::uint32_t>(random.between(0, 0xFFFFFFFF)); };
        dropout = {{word(), word()}, threshold(), threshold(), static_cast<std::uint32_t>(one_of({0, 1, 1, 9}))};
        P = offsets.back();
        for (std::int64_t b = 0; b < B; ++b) {
            rows.push_back(word());
            out_rows += output == Output::last ? 1 : output == Output::steps ? depth[place(b)] : length(b);
            tape_rows += length(b) * depth[place(b)] * shape.layers - (output == Output::tokens ? 0 : length(b) - 1);
        }
        rows.shrink_to_fit();
        const std::int64_t D = shape.D, I = shape.I;
        h = numbers(random, P * D, 0.0f, 2.0f), pre = numbers(random, shape.adapter == Adapter::none ? 0 : P * D, 0.0f, 1.0f);
        out_grad = numbers(random, out_rows * D, 0.0f, 1.0f);
        const auto matrix = [&](std::int64_t out, std::int64_t in) {
            weights.push_back(numbers(random, out * in, 0.0f, 1.0f / std::sqrt(static_cast<float>(in))));
            weights.push_back(numbers(random, out, 0.0f, 0.2f));
        };
        const auto norm = [&] { weights.push_back(numbers(random, D, 1.0f, 0.2f)), weights.push_back(numbers(random, D, 0.0f, 0.2f)); };
        if (shape.adapter == Adapter::linear) weights.push_back(numbers(random, 1, 0.0f, 1.0f));
        if (shape.adapter == Adapter::concat) matrix(D, 2 * D);
        if (shape.adapter != Adapter::none) norm();
        for (std::int64_t i = 0; i < shape.layers; ++i) {
            for (int projection = 0; projection < 4; ++projection) matrix(D, D);
            norm(), matrix(I, D), matrix(D, I), norm();
        }
    }

    std::int64_t length(std::int64_t b) const { return offsets[place(b) + 1] - offsets[place(b)]; }

    // Where the norm of the adapter and the layers' weights begin.
    std::size_t norm_weight() const { return shape.adapter == Adapter::linear ? 1 : shape.adapter == Adapter::concat ? 2 : 0; }
    std::size_t layer_weight(std::int64_t layer) const {
        return norm_weight() + (shape.adapter == Adapter::none ? 0 : 2) + place(layer * LAYER_WEIGHTS);
    }

    std::string describe() const {
        std::ostringstream text;
        text << "D " << shape.D << ", H " << shape.H << ", inner " << shape.I << ", layers " << shape.layers << ", adapter "
             << static_cast<int>(shape.adapter) << ", output " << static_cast<int>(output) << ", thresholds " << dropout.hidden << ' '
             << dropout.attention << ", level " << lares_fast::level_name() << ", length x depth";
        for (std::int64_t b = 0; b < B; ++b) text << ' ' << length(b) << 'x' << depth[place(b)];
        return text.str();
    }

private:
    static Tensor numbers(Random& random, std::int64_t n, float mean, float deviation) {
        Tensor values(place(n));
        for (float& value : values) value = mean + deviation * random.normal();
        return values;
    }

    // Multiplications of a forward, about.
    std::int64_t work() const {
        std::int64_t total = 0;
        for (std::int64_t b = 0; b < B; ++b) {
            total += length(b) * depth[place(b)] * shape.layers * (shape.D * (4 * shape.D + 2 * shape.I) + length(b) * shape.D) / 8;
        }
        return total;
    }
};

// Of a forward and a backward, in memory of exactly their size.
struct Results {
    Tensor out, tape, h_grad, pre_grad;
    std::vector<Tensor> weight_grads;

    explicit Results(const Case& c)
        : out(place(c.out_rows * c.shape.D), UNTOUCHED), tape(place(c.tape_rows * (2 * c.shape.D + 2)), UNTOUCHED),
          h_grad(c.h.size(), UNTOUCHED), pre_grad(c.pre.size(), UNTOUCHED) {
        for (const Tensor& weight : c.weights) weight_grads.emplace_back(weight.size(), UNTOUCHED);
    }

    std::vector<const Tensor*> all() const {
        std::vector<const Tensor*> tensors{&out, &h_grad, &pre_grad};
        for (const Tensor& grad : weight_grads) tensors.push_back(&grad);
        return tensors;
    }
};

bool same_bits(const Tensor& a, const Tensor& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

bool same_bits(const Results& a, const Results& b) {
    const std::vector<const Tensor*> x = a.all(), y = b.all();
    return std::equal(x.begin(), x.end(), y.begin(), [](const Tensor* s, const Tensor* t) { return same_bits(*s, *t); });
}

// A case and its results as the pointers that a call has.
struct Call {
    std::vector<const float*> weights;
    std::vector<float*> weight_grads;
    Recurrence call;
    Results& results;
    const float* out_grad;

    Call(const Case& c, Results& to)
        : call{c.shape, c.output, c.eps, c.dropout, c.h.data(), c.shape.adapter == Adapter::none ? nullptr : c.pre.data(), c.offsets.data(),
               c.depth.data(), c.rows.data(), c.B, nullptr, to.tape.data()},
          results(to), out_grad(c.out_grad.data()) {
        for (const Tensor& weight : c.weights) weights.push_back(weight.data());
        for (Tensor& grad : to.weight_grads) weight_grads.push_back(grad.data());
        call.weights = weights.data();
    }

    void forward(std::int64_t threads) { lares_fast::recurrence_forward(call, results.out.data(), threads); }
    void backward(std::int64_t threads) {
        lares_fast::recurrence_backward(call, out_grad, results.h_grad.data(), results.pre_grad.data(), weight_grads.data(), threads);
    }
};

// The same in fp64, sequence by sequence and sum by sum.
class Truth {
public:
    Rows out, h_grad, pre_grad;
    std::vector<Rows> weight_grads;

    explicit Truth(const Case& test)
        : out(place(test.out_rows * test.shape.D)), h_grad(test.h.size()), pre_grad(test.pre.size()), c_(test), D_(test.shape.D) {
        for (const Tensor& weight : c_.weights) {
            weights_.emplace_back(weight.begin(), weight.end());
            weight_grads.emplace_back(weight.size());
        }
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

    // Rows of the output from `row` on; returns the first of the next sequence.
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
            std::copy(tokens ? h.begin() : h.end() - D_, h.end(), out.begin() + end * D_);
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
        std::copy(grad.begin(), grad.end(), h_grad.begin() + first_ * D_);
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
                    weight_grads[0][0] += g * (s.h[at] - static_cast<double>(c_.pre[token])) * share() * (1 - share());
                }
                grad[at] = concat ? joined[place(m * 2 * D_ + d)] : share() * g;
                pre_grad[token] += concat ? joined[place((m * 2 + 1) * D_ + d)] : (1 - share()) * g;
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

    // `grad` is of the layer's output, afterwards of its input.
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

    // x * factors + y; no factors are ones.
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

    // Calls at(index of a probability, first of the query's columns, first of the key's) for every visible pair.
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

    // x W^T + b of the weights `w` and `w + 1`.
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
            weight_grads[w + 1][i % out] += grad[i];
            for (std::size_t k = 0; k < in; ++k) {
                x_grad[row + k] += grad[i] * weights_[w][column + k];
                weight_grads[w][column + k] += grad[i] * x[row + k];
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
                weight_grads[w][place(d)] += grad[at] * kept.xhat[at];
                weight_grads[w + 1][place(d)] += grad[at];
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
    const std::int64_t D_;
    std::vector<Rows> weights_;
    std::int64_t b_ = 0, L_ = 0, first_ = 0;  // the sequence that is worked on
};

// Sum of squares and number of the values of some tensors.
struct Size {
    double squares = 0.0, count = 0.0;

    void add(const Rows& values) {
        for (const double value : values) squares += value * value;
        count += static_cast<double>(values.size());
    }
    double rms() const { return count > 0 ? std::sqrt(squares / count) : 0.0; }
};

// What is wrong with a tensor, or nothing.
std::string fault(const Case& c, const std::string& name, const Tensor& found, const Rows& truth, double floor) {
    Size size;
    size.add(truth);
    double most = 0.0;
    for (const double value : truth) most = std::max(most, std::abs(value));
    const double bound = CEILING * std::max({size.rms(), floor, most / 16});
    for (std::size_t i = 0; i < truth.size(); ++i) {
        if (std::abs(static_cast<double>(found[i]) - truth[i]) <= bound) continue;
        std::ostringstream text;
        text.precision(9);
        text << "recurrence, " << c.describe() << ": " << name << '[' << i << "] is " << found[i] << ", and should be " << truth[i]
             << " within " << bound;
        return text.str();
    }
    return "";
}

// A tenth of the rms of all gradients: the floor of the law, because some are zero but for rounding.
double floor_of(const Truth& truth) {
    Size all;
    all.add(truth.h_grad), all.add(truth.pre_grad);
    for (const Rows& grad : truth.weight_grads) all.add(grad);
    return all.rms() / 10;
}

// True where the truth moves by a tenth of the ceiling when each number moves by a rounding of fp32: what fp32 gives there says
// nothing about a kernel.
bool is_ill_conditioned(const Case& c, const Truth& truth) {
    Case moved = c;
    Random random(1);
    const auto move = [&](Tensor& values) {
        for (float& value : values) value *= 1.0f + (random.chance(0.5) ? 1.2e-7f : -1.2e-7f);
    };
    move(moved.h), move(moved.pre);
    for (Tensor& weight : moved.weights) move(weight);
    const Truth other(moved);
    const auto moves = [](const Rows& a, const Rows& b, double floor) {
        Size size;
        size.add(a);
        double most = 0.0, largest = 0.0;
        for (std::size_t i = 0; i < a.size(); ++i) {
            most = std::max(most, std::abs(a[i] - b[i])), largest = std::max(largest, std::abs(a[i]));
        }
        return most > CEILING / 10 * std::max({size.rms(), floor, largest / 16});
    };
    const double floor = floor_of(truth);
    bool any = moves(truth.out, other.out, 0.0) || moves(truth.h_grad, other.h_grad, floor) || moves(truth.pre_grad, other.pre_grad, floor);
    for (std::size_t i = 0; i < truth.weight_grads.size(); ++i) any = any || moves(truth.weight_grads[i], other.weight_grads[i], floor);
    return any;
}

std::string fault(const Case& c, const Results& found, const Truth& truth) {
    const double floor = floor_of(truth);
    std::string text = fault(c, "out", found.out, truth.out, 0.0);
    const auto look = [&](const std::string& name, const Tensor& grad, const Rows& right) {
        if (text.empty()) text = fault(c, name, grad, right, floor);
    };
    look("h_grad", found.h_grad, truth.h_grad);
    look("pre_grad", found.pre_grad, truth.pre_grad);
    for (std::size_t i = 0; i < truth.weight_grads.size(); ++i) {
        look("gradient of weight " + std::to_string(i), found.weight_grads[i], truth.weight_grads[i]);
    }
    return text;
}

// Cases that were compared with the truth, and those of them that were excused as ill-conditioned.
std::atomic<std::int64_t> compared{0}, excused{0};

void compare(const Case& c, const Results& found) {
    const Truth truth(c);
    ++compared;
    const std::string text = fault(c, found, truth);
    if (text.empty()) return;
    if (!is_ill_conditioned(c, truth)) fail(text);
    if (++excused > 2 + compared / 400) fail("too many cases are excused as ill-conditioned; the last: " + text);
}

// Memory is kept from call to call, and must be no way for a NaN to get from one to the next.
void leave_nans_behind(const Case& c) {
    Case spoilt = c;
    std::fill(spoilt.h.begin(), spoilt.h.end(), std::numeric_limits<float>::quiet_NaN());
    for (Tensor& weight : spoilt.weights) std::fill(weight.begin(), weight.end(), std::numeric_limits<float>::quiet_NaN());
    Results results(spoilt);
    Call call(spoilt, results);
    call.forward(2);
    call.backward(2);
}

void valid(Random& random, bool large, std::int64_t threads) {
    const Case c(random, large);
    if (random.chance(0.2)) leave_nans_behind(c);
    Results results(c), again(c), untaped(c);
    Call call(c, results), other(c, again), without_tape(c, untaped);
    call.forward(threads);
    call.backward(threads);
    compare(c, results);

    const auto differ = [&](const std::string& by) { fail("recurrence differs by " + by + ": " + c.describe()); };
    for (const std::int64_t others : {1, 2, 3}) {
        if (others == threads) continue;
        other.forward(others);
        other.backward(others);
        if (!same_bits(results, again)) differ("threads");
    }
    without_tape.call.tape = nullptr;
    without_tape.forward(threads);
    if (!same_bits(results.out, untaped.out)) differ("whether there will be a backward");
}

constexpr std::int64_t HUGE_SIZE = std::int64_t{1} << 62;

const std::vector<Spoiler<Recurrence>> SPOILERS = {
    {"no h", [](Recurrence& r) { r.h = nullptr; }},
    {"no pre", [](Recurrence& r) { r.pre = nullptr, r.shape.adapter = Adapter::add; }},
    {"no offsets", [](Recurrence& r) { r.offsets = nullptr; }},
    {"no depth", [](Recurrence& r) { r.depth = nullptr; }},
    {"no rows", [](Recurrence& r) { r.rows = nullptr, r.dropout.attention = 1; }},
    {"no weights", [](Recurrence& r) { r.weights = nullptr; }},
    {"B < 0", [](Recurrence& r) { r.B = -1; }},
    {"the least B", [](Recurrence& r) { r.B = std::numeric_limits<std::int64_t>::min(); }},
    {"D = 0", [](Recurrence& r) { r.shape.D = 0; }},
    {"D < 0", [](Recurrence& r) { r.shape.D = -16; }},
    {"D between multiples of 16", [](Recurrence& r) { r.shape.D += 8; }},
    {"D of 272", [](Recurrence& r) { r.shape.D = 272; }},
    {"D huge", [](Recurrence& r) { r.shape.D = HUGE_SIZE; }},
    {"H = 0", [](Recurrence& r) { r.shape.H = 0; }},
    {"H < 0", [](Recurrence& r) { r.shape.H = -1; }},
    {"H not a divisor of D", [](Recurrence& r) { r.shape.H = r.shape.D - 1; }},
    {"inner size 0", [](Recurrence& r) { r.shape.I = 0; }},
    {"inner size between multiples of 16", [](Recurrence& r) { r.shape.I += 1; }},
    {"inner size huge", [](Recurrence& r) { r.shape.I = HUGE_SIZE; }},
    {"no layers", [](Recurrence& r) { r.shape.layers = 0; }},
    {"layers huge", [](Recurrence& r) { r.shape.layers = HUGE_SIZE; }},
    {"hidden threshold 65536", [](Recurrence& r) { r.dropout.hidden = 65536; }},
    {"attention threshold 65536", [](Recurrence& r) { r.dropout.attention = 65536; }},
};

void invalid(Random& random) {
    std::unique_ptr<Case> of_any_size;
    do of_any_size = std::make_unique<Case>(random, false);
    while (of_any_size->B == 0);
    Case& c = *of_any_size;
    Results results(c);
    const Results fresh(c);
    Call call(c, results);
    bool forward = random.chance(0.5);
    std::int64_t threads = 2;
    std::string what;
    const auto b = place(random.between(0, c.B - 1));
    using Limits = std::numeric_limits<std::int64_t>;
    switch (random.between(0, 6)) {
        case 0:
            what = "no threads";
            threads = random.between(-5, 0);
            break;
        case 1:
            what = "a depth out of range";
            c.depth[b] = random.one_of<std::int64_t>({0, -1, 65536, Limits::min(), Limits::max()});
            break;
        case 2:
            what = "a row out of range";
            c.rows[b] = random.one_of<std::int64_t>({-1, std::int64_t{1} << 32, Limits::min(), Limits::max()});
            break;
        case 3:
            what = "a length out of range";
            c.offsets[b + 1] = c.offsets[b] + random.one_of<std::int64_t>({0, -1, 513, HUGE_SIZE});
            break;
        case 4:
            what = "offsets that begin elsewhere";
            c.offsets[0] = random.one_of<std::int64_t>({1, -1, Limits::min()});
            break;
        default: {
            if (random.chance(0.1)) {
                what = "no tape";
                forward = false;
                call.call.tape = nullptr;
                break;
            }
            const Spoiler<Recurrence> spoiler = random.one_of(SPOILERS);
            what = spoiler.name;
            spoiler.spoil(call.call);
        }
    }
    const char* const op = forward ? "recurrence_forward" : "recurrence_backward";
    must_refuse(op, what.c_str(), [&] { forward ? call.forward(threads) : call.backward(threads); });
    if (!same_bits(results, fresh)) fail("recurrence wrote into the output of a call that it refused: " + what);
}

}  // namespace

const OpTest recurrence{"recurrence", valid, invalid};

}  // namespace op_test
