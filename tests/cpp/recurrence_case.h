// Random calls of the recurrence, and their results.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "op_test.h"
#include "recurrence/recurrence.h"

namespace op_test {

using lares_fast::Adapter;
using lares_fast::Recurrence;
using Output = lares_fast::Output;
using Tensor = std::vector<float>;

inline std::size_t place(std::int64_t i) { return static_cast<std::size_t>(i); }

// Weights of a layer, one after the other, in the order of the reference's parameters.
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

    Case(Random& random, bool large);

    std::int64_t length(std::int64_t b) const { return offsets[place(b) + 1] - offsets[place(b)]; }

    // The numbers of the first weight of the adapter's norm and of a layer.
    std::size_t norm_weight() const { return shape.adapter == Adapter::linear ? 1 : shape.adapter == Adapter::concat ? 2 : 0; }
    std::size_t layer_weight(std::int64_t layer) const {
        return norm_weight() + (shape.adapter == Adapter::none ? 0 : 2) + place(layer * LAYER_WEIGHTS);
    }

    std::string describe() const;

private:
    // The approximate number of multiplications of a forward pass.
    std::int64_t work() const;
};

// The value of all outputs before a call.
constexpr float UNTOUCHED = 7.0f;

// The results of a forward and a backward pass, in memory of exactly their size.
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

bool same_bits(const Tensor& a, const Tensor& b);
bool same_bits(const Results& a, const Results& b);

// A case and its results as the pointers of a call.
struct Call {
    std::vector<const float*> weights;
    std::vector<float*> grads;
    Recurrence call;
    float *out, *h_grad, *pre_grad;
    const float* out_grad;
    float* const* weight_grads;

    Call(const Case& c, Results& to)
        : call{c.shape, c.output, c.eps, c.dropout, c.h.data(), c.shape.adapter == Adapter::none ? nullptr : c.pre.data(), c.offsets.data(),
               c.depth.data(), c.rows.data(), c.B, nullptr, to.tape.data(), false},
          out(to.out.data()), h_grad(to.h_grad.data()), pre_grad(to.pre_grad.data()), out_grad(c.out_grad.data()) {
        for (const Tensor& weight : c.weights) weights.push_back(weight.data());
        for (Tensor& grad : to.weight_grads) grads.push_back(grad.data());
        // Memory of exactly their size shows a read beyond them.
        weights.shrink_to_fit(), grads.shrink_to_fit();
        call.weights = weights.data();
        weight_grads = grads.data();
    }

    void forward(std::int64_t threads) { lares_fast::recurrence_forward(call, out, threads); }
    void backward(std::int64_t threads) { lares_fast::recurrence_backward(call, out_grad, h_grad, pre_grad, weight_grads, threads); }
};

}  // namespace op_test
