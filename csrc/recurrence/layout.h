// Sizes, packed weights and gradients of a recurrence, for its driver and its kernels. A matrix of activations or weights
// is a stack of panels of 16 columns. Element (row, column) of a matrix of `rows` rows is at (column / 16 * rows + row) *
// 16 + column % 16.
#pragma once

#include <cstdint>

#include "memory/carver.h"

namespace lares_fast {

constexpr std::int64_t COLUMNS = 16;  // columns of a panel
// Buffers hold whole tiles of rows, whatever the instruction set is.
constexpr std::int64_t ROW_TILE = 6;

inline std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

enum class Adapter { none, add, linear, concat };
enum class Output { last, steps, tokens };

struct Shape {
    std::int64_t D, H, I, layers;
    Adapter adapter;

    std::int64_t head() const { return D / H; }
    // The columns of a head begin at the beginning of a panel. The added columns are zero.
    std::int64_t head_panels() const { return (head() + COLUMNS - 1) / COLUMNS; }
    // Width of the queries, keys and values.
    std::int64_t A() const { return H * head_panels() * COLUMNS; }
};

// Panels of W^T, which inputs are multiplied with, and of W (`_back`), which gradients are multiplied with.
struct LayerWeights {
    float *query, *key_value, *output, *up, *down;
    float *query_back, *key_value_back, *output_back, *up_back, *down_back;
    float *query_bias, *key_value_bias, *output_bias, *up_bias, *down_bias;
    float *scale1, *shift1, *scale2, *shift2;
};

struct AdapterWeights {
    float *state, *pre, *state_back, *pre_back, *bias;  // concat
    float share;                                        // factor of the state in add and linear
    float *scale, *shift;
};

// Sums over tokens. Matrices are [out, in], row by row.
struct LayerGradients {
    float *query, *key_value, *output, *up, *down;
    float *query_bias, *key_value_bias, *output_bias, *up_bias, *down_bias;
    float *scale1, *shift1, *scale2, *shift2;
};

struct AdapterGradients {
    float *state, *pre, *bias;  // concat
    double* share;              // linear
    float *scale, *shift;
};

inline LayerWeights carve_weights(Carver& c, const Shape& s) {
    const std::int64_t D = s.D, A = s.A(), I = s.I;
    LayerWeights w{};
    w.query = c.take(A * D), w.key_value = c.take(2 * A * D), w.output = c.take(A * D), w.up = c.take(I * D), w.down = c.take(I * D);
    w.query_back = c.take(A * D), w.key_value_back = c.take(2 * A * D), w.output_back = c.take(A * D);
    w.up_back = c.take(I * D), w.down_back = c.take(I * D);
    w.query_bias = c.take(A), w.key_value_bias = c.take(2 * A), w.output_bias = c.take(D), w.up_bias = c.take(I), w.down_bias = c.take(D);
    w.scale1 = c.take(D), w.shift1 = c.take(D), w.scale2 = c.take(D), w.shift2 = c.take(D);
    return w;
}

inline AdapterWeights carve_adapter_weights(Carver& c, const Shape& s) {
    AdapterWeights w{};
    if (s.adapter == Adapter::concat) {
        w.state = c.take(s.D * s.D), w.pre = c.take(s.D * s.D);
        w.state_back = c.take(s.D * s.D), w.pre_back = c.take(s.D * s.D), w.bias = c.take(s.D);
    }
    if (s.adapter != Adapter::none) w.scale = c.take(s.D), w.shift = c.take(s.D);
    return w;
}

inline LayerGradients carve_gradients(Carver& c, const Shape& s) {
    const std::int64_t D = s.D, A = s.A(), I = s.I;
    LayerGradients g{};
    g.query = c.take(A * D), g.key_value = c.take(2 * A * D), g.output = c.take(A * D), g.up = c.take(I * D), g.down = c.take(I * D);
    g.query_bias = c.take(A), g.key_value_bias = c.take(2 * A), g.output_bias = c.take(D), g.up_bias = c.take(I), g.down_bias = c.take(D);
    g.scale1 = c.take(D), g.shift1 = c.take(D), g.scale2 = c.take(D), g.shift2 = c.take(D);
    return g;
}

inline AdapterGradients carve_adapter_gradients(Carver& c, const Shape& s) {
    AdapterGradients g{};
    if (s.adapter == Adapter::concat) g.state = c.take(s.D * s.D), g.pre = c.take(s.D * s.D), g.bias = c.take(s.D);
    if (s.adapter != Adapter::none) g.scale = c.take(s.D), g.shift = c.take(s.D);
    return g;
}

}  // namespace lares_fast
