// T steps of transformer layers over packed sequences, forward and backward.
#pragma once

#include <cstdint>

#include "recurrence/recurrence_kernel.h"

namespace lares_fast {

struct Recurrence {
    Shape shape;
    Output output;
    float eps;
    Dropout dropout;
    const float *h, *pre;         // [P, D]; pre is null without an adapter
    const std::int64_t* offsets;  // [B + 1]
    const std::int64_t* depth;    // [B]
    const std::int64_t* rows;     // [B], rows of the global batch; null if nothing is dropped
    std::int64_t B;
    const float* const* weights;  // weight_count tensors in the order of the reference's parameters
    float* tape;                  // tape_rows * (2 D + 2) floats, or null if there will be no backward pass
    bool bf16;                    // operands of products with weights are rounded to bf16; forward only
};

// The number of weights: the tensors of the adapter and its norm, and the tensors of each layer.
inline std::int64_t weight_count(const Shape& s) {
    const std::int64_t adapter = s.adapter == Adapter::none ? 0 : s.adapter == Adapter::add ? 2 : s.adapter == Adapter::linear ? 3 : 4;
    return adapter + 16 * s.layers;
}

// Workspace of both functions: one block of at least 168 tokens a thread. The backward pass also needs eight sets of
// gradients, whatever the number of threads is, so that sums are added in one order. Both throw std::invalid_argument for
// bad arguments.
void recurrence_forward(const Recurrence& call, float* out, std::int64_t threads);

// Writes all of h_grad and pre_grad [P, D], and the gradients of all weights.
void recurrence_backward(const Recurrence& call, const float* out_grad, float* h_grad, float* pre_grad, float* const* weight_grads,
                         std::int64_t threads);

}  // namespace lares_fast
