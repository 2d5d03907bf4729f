#include "recurrence/pack.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>

#include "recurrence/bf16.h"

namespace lares_fast {
namespace {

// Places of the columns of queries, keys or values after padding to whole panels a head.
struct HeadPlaces {
    std::int64_t head, padded;
    std::int64_t operator()(std::int64_t i) const { return i / head * padded + i % head; }
};

struct SamePlaces {
    std::int64_t operator()(std::int64_t i) const { return i; }
};

float& element(float* panels, std::int64_t rows, std::int64_t row, std::int64_t column) {
    return panels[(column / COLUMNS * rows + row) * COLUMNS + column % COLUMNS];
}

// Stores one element of a matrix in pairs: element (row, column) of a panel is the bf16 (row / 2, column, row % 2).
void store_pair(float* panels, std::int64_t rows, std::int64_t row, std::int64_t column, std::uint16_t value) {
    const std::int64_t panel = column / COLUMNS * round_up(rows, 2 * COLUMNS) / 2 * COLUMNS;
    const std::int64_t place = (row / 2 * COLUMNS + column % COLUMNS) * 2 + row % 2;
    std::memcpy(reinterpret_cast<std::uint16_t*>(panels + panel) + place, &value, sizeof value);
}

// A weight matrix of the reference, W [out, in] with `stride` floats from row to row.
struct Source {
    const float* weight;
    std::int64_t out, in, stride;
};

// The panels that a matrix is packed to. `forward` receives W^T, a matrix of `rows` rows. `back` is null or receives W, a
// matrix of `back_rows` rows. The rows of W begin at row `first`.
struct Target {
    float* forward;
    std::int64_t rows;
    float* back;
    std::int64_t back_rows;
    std::int64_t first = 0;
};

template <class Outs, class Ins>
void pack_matrix(Elements elements, const Source& from, const Outs& outs, const Ins& ins, const Target& to) {
    for (std::int64_t o = 0; o < from.out; ++o) {
        for (std::int64_t i = 0; i < from.in; ++i) {
            const float value = from.weight[o * from.stride + i];
            const std::int64_t out = to.first + outs(o), in = ins(i);
            if (elements == Elements::pairs) {
                store_pair(to.forward, to.rows, in, out, to_bf16(value));
            } else {
                element(to.forward, to.rows, in, out) = elements == Elements::rounded ? from_bf16(to_bf16(value)) : value;
            }
            if (to.back) element(to.back, to.back_rows, out, in) = value;
        }
    }
}

template <class Places>
void pack_vector(const float* b, std::int64_t n, const Places& places, float* to) {
    for (std::int64_t i = 0; i < n; ++i) to[places(i)] = b[i];
}

template <class Outs, class Ins>
void unpack_matrix(const float* sums, std::int64_t out, std::int64_t in, std::int64_t stride, const Outs& outs, const Ins& ins, float* to) {
    for (std::int64_t o = 0; o < out; ++o) {
        for (std::int64_t i = 0; i < in; ++i) to[o * in + i] = sums[outs(o) * stride + ins(i)];
    }
}

template <class Places>
void unpack_vector(const float* sums, std::int64_t n, const Places& places, float* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = sums[places(i)];
}

}  // namespace

void pack(const Shape& s, const float* const* weights, bool backward, Elements elements, PackedModel& to) {
    const std::int64_t D = s.D, A = s.A(), I = s.I;
    const HeadPlaces heads{s.head(), A / s.H};
    const SamePlaces same;
    const auto back = [&](float* panels) { return backward ? panels : nullptr; };
    AdapterWeights& a = to.adapter;
    a.share = 0.5f;
    if (s.adapter == Adapter::linear) a.share = 1 / (1 + std::exp(-**weights++));
    if (s.adapter == Adapter::concat) {
        std::fill(a.state, a.state + D * D, 0.0f);
        std::fill(a.pre, a.pre + D * D, 0.0f);
        pack_matrix(elements, {weights[0], D, D, 2 * D}, same, same, {a.state, D, back(a.state_back), D});
        pack_matrix(elements, {weights[0] + D, D, D, 2 * D}, same, same, {a.pre, D, back(a.pre_back), D});
        pack_vector(weights[1], D, same, a.bias);
        weights += 2;
    }
    if (s.adapter != Adapter::none) {
        pack_vector(*weights++, D, same, a.scale);
        pack_vector(*weights++, D, same, a.shift);
    }
    for (LayerWeights& l : to.layers) {
        if (elements == Elements::pairs) {
            std::fill(l.up, l.up + I * D, 0.0f);
            std::fill(l.down, l.down + I * D, 0.0f);
        }
        if (A > D || elements == Elements::pairs) {
            // These are the columns between heads and, for pairs, the rows that make the number of rows even.
            std::fill(l.query, l.query + A * D, 0.0f);
            std::fill(l.key_value, l.key_value + 2 * A * D, 0.0f);
            std::fill(l.output, l.output + A * D, 0.0f);
            std::fill(l.query_back, l.query_back + A * D, 0.0f);
            std::fill(l.key_value_back, l.key_value_back + 2 * A * D, 0.0f);
            std::fill(l.output_back, l.output_back + A * D, 0.0f);
            std::fill(l.query_bias, l.query_bias + A, 0.0f);
            std::fill(l.key_value_bias, l.key_value_bias + 2 * A, 0.0f);
        }
        pack_matrix(elements, {weights[0], D, D, D}, heads, same, {l.query, D, back(l.query_back), A});
        pack_vector(weights[1], D, heads, l.query_bias);
        pack_matrix(elements, {weights[2], D, D, D}, heads, same, {l.key_value, D, back(l.key_value_back), 2 * A});
        // A key's bias adds the same number to all scores of a query, which does not change the softmax. Scores are more
        // accurate without it.
        std::fill(l.key_value_bias, l.key_value_bias + A, 0.0f);
        pack_matrix(elements, {weights[4], D, D, D}, heads, same, {l.key_value, D, back(l.key_value_back), 2 * A, A});
        pack_vector(weights[5], D, heads, l.key_value_bias + A);
        pack_matrix(elements, {weights[6], D, D, D}, same, heads, {l.output, A, back(l.output_back), D});
        pack_vector(weights[7], D, same, l.output_bias);
        pack_vector(weights[8], D, same, l.scale1);
        pack_vector(weights[9], D, same, l.shift1);
        pack_matrix(elements, {weights[10], I, D, D}, same, same, {l.up, D, back(l.up_back), I});
        pack_vector(weights[11], I, same, l.up_bias);
        pack_matrix(elements, {weights[12], D, I, I}, same, same, {l.down, I, back(l.down_back), D});
        pack_vector(weights[13], D, same, l.down_bias);
        pack_vector(weights[14], D, same, l.scale2);
        pack_vector(weights[15], D, same, l.shift2);
        weights += 16;
    }
}

void unpack(const Shape& s, const float* const* weights, const GradientSlot& from, float* const* grads) {
    const std::int64_t D = s.D, A = s.A(), I = s.I;
    const HeadPlaces heads{s.head(), A / s.H};
    const SamePlaces same;
    const AdapterGradients& a = from.adapter;
    if (s.adapter == Adapter::linear) {
        // With an exponential that does not overflow, 1 - share keeps its digits. The gradient is the same for -gate.
        const double power = std::exp(-std::abs(static_cast<double>(**weights)));
        **grads++ = static_cast<float>(*a.share * power / ((1 + power) * (1 + power)));
    }
    if (s.adapter == Adapter::concat) {
        for (std::int64_t o = 0; o < D; ++o) {
            std::copy(a.state + o * D, a.state + (o + 1) * D, grads[0] + o * 2 * D);
            std::copy(a.pre + o * D, a.pre + (o + 1) * D, grads[0] + o * 2 * D + D);
        }
        unpack_vector(a.bias, D, same, grads[1]);
        grads += 2;
    }
    if (s.adapter != Adapter::none) {
        unpack_vector(a.scale, D, same, *grads++);
        unpack_vector(a.shift, D, same, *grads++);
    }
    for (const LayerGradients& l : from.layers) {
        unpack_matrix(l.query, D, D, D, heads, same, grads[0]);
        unpack_vector(l.query_bias, D, heads, grads[1]);
        unpack_matrix(l.key_value, D, D, D, heads, same, grads[2]);
        unpack_vector(l.key_value_bias, D, heads, grads[3]);
        unpack_matrix(l.key_value + A * D, D, D, D, heads, same, grads[4]);
        unpack_vector(l.key_value_bias + A, D, heads, grads[5]);
        unpack_matrix(l.output, D, D, A, same, heads, grads[6]);
        unpack_vector(l.output_bias, D, same, grads[7]);
        unpack_vector(l.scale1, D, same, grads[8]);
        unpack_vector(l.shift1, D, same, grads[9]);
        unpack_matrix(l.up, I, D, D, same, same, grads[10]);
        unpack_vector(l.up_bias, I, same, grads[11]);
        unpack_matrix(l.down, D, I, I, same, same, grads[12]);
        unpack_vector(l.down_bias, D, same, grads[13]);
        unpack_vector(l.scale2, D, same, grads[14]);
        unpack_vector(l.shift2, D, same, grads[15]);
        grads += 16;
    }
}

}  // namespace lares_fast
