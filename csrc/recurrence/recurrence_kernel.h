// The part of the recurrence that is compiled once a SIMD level: all steps of one block of sequences.
#pragma once

#include <cstdint>

#include "random/philox.h"
#include "recurrence/layout.h"

namespace lares_fast {

struct Dropout {
    Key key;
    std::uint32_t hidden, attention;  // thresholds, docs/numerics.md; 0 drops nothing
    std::uint32_t first_step;         // the address of the first step
};

struct Model {
    Shape shape;
    const LayerWeights* layers;
    AdapterWeights adapter;
    float eps;
    Dropout dropout;
    Output output;
};

struct Sequence {
    std::int64_t first;  // its first token in the call's buffers
    std::int64_t start;  // and in its block
    std::int64_t length, depth;
    std::int64_t out;  // its first row of the output; with Output::tokens its first token
    std::uint32_t row;  // of the global batch
};

// Whole sequences, the deepest first: those that take part in a step are a beginning of the block.
struct Block {
    const Sequence* sequences;
    std::int64_t count, tokens, longest;
    // For the backward: a row a token, layer and step, or null where no gradient will be asked for.
    float* normal;   // two normalised rows [D]
    float* inverse;  // and their reciprocal deviations
};

struct Gradients {
    LayerGradients* layers;
    AdapterGradients adapter;
};

struct RecurrenceKernel {
    std::int64_t (*workspace)(const Shape&, std::int64_t tokens, std::int64_t longest, bool backward);  // in floats
    // h, pre [P, D] -> rows of out.
    void (*forward)(const Model&, const Block&, const float* h, const float* pre, float* out, float* workspace);
    // Writes the block's rows of h_grad and pre_grad, adds to `sums`.
    void (*backward)(const Model&, const Block&, const float* h, const float* pre, const float* out_grad, float* h_grad, float* pre_grad,
                     const Gradients& sums, float* workspace);
};

const RecurrenceKernel* best_recurrence_kernel();

// Forward alone, the operands of products with weights rounded to bf16.
struct Bf16Kernel {
    // How weights are packed: two rows of a panel in one, [8][16 columns][2] in bf16, an even number of panels of rows; or as
    // fp32 that has been rounded.
    bool pairs;
    void (*forward)(const Model&, const Block&, const float* h, const float* pre, float* out, float* workspace);
};

const Bf16Kernel* best_bf16_kernel();

}  // namespace lares_fast
