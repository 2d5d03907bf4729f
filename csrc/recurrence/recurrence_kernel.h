// The part of the recurrence that is compiled once for each instruction set: all steps of one block of sequences.
#pragma once

#include <cstdint>

#include "random/philox.h"
#include "recurrence/layout.h"

namespace lares_fast {

struct Dropout {
    Key key;
    std::uint32_t hidden, attention;  // thresholds, docs/numerics.md; 0 drops nothing
    std::uint32_t first_step;         // number of the first step in addresses
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
    std::int64_t first;  // its first token in the buffers of the call
    std::int64_t start;  // its first token in its block
    std::int64_t length, depth;
    std::int64_t out;  // its first row of the output; with Output::tokens its first token
    std::uint32_t row;  // row of the global batch
};

// Whole sequences, the deepest first, so that the sequences that are active in a step are the first ones of the block.
struct Block {
    const Sequence* sequences;
    std::int64_t count, tokens, longest;
    // The tape for the backward pass, with one row for each token, layer and step. Null if there will be no backward pass.
    float* normal;   // two normalised rows [D]
    float* inverse;  // the reciprocal deviations of these rows
};

struct Gradients {
    LayerGradients* layers;
    AdapterGradients adapter;
};

struct RecurrenceKernel {
    std::int64_t (*workspace)(const Shape&, std::int64_t tokens, std::int64_t longest, bool backward);  // in floats
    // Reads h and pre [P, D] and writes the block's rows of out.
    void (*forward)(const Model&, const Block&, const float* h, const float* pre, float* out, float* workspace);
    // Writes the block's rows of h_grad and pre_grad, and adds to `sums`.
    void (*backward)(const Model&, const Block&, const float* h, const float* pre, const float* out_grad, float* h_grad, float* pre_grad,
                     const Gradients& sums, float* workspace);
};

const RecurrenceKernel* best_recurrence_kernel();

// The forward pass with the operands of products with weights rounded to bf16.
struct Bf16Kernel {
    // True if weights are packed in pairs: two rows of a panel are one row [8][16 columns][2] of bf16, and the number of
    // panels of rows is even. Otherwise weights are fp32 numbers that were rounded to bf16.
    bool pairs;
    void (*forward)(const Model&, const Block&, const float* h, const float* pre, float* out, float* workspace);
};

const Bf16Kernel* best_bf16_kernel();

}  // namespace lares_fast
