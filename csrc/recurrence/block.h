// What the forward and the backward pass of a block share: memory, layers, and the entry into a step.
#pragma once

#include "recurrence/attention.h"
#include "recurrence/product.h"
#include "recurrence/recurrence_kernel.h"
#include "recurrence/rows.h"

namespace lares_fast {
namespace {

constexpr std::uint32_t AFTER_ATTENTION = 1, AFTER_FEED_FORWARD = 2;

struct Workspace {
    Matrix x;          // [tokens, D]: the state, the input of a layer
    Matrix query_x;    // [rows, D]: the rows of x that a last layer computes
    Matrix base;       // [tokens, D]: what the adapter adds to the state of each step
    Matrix query, key_value, context, inner;
    Matrix middle;     // [rows, D]: between attention and feed-forward
    float* attention;  // as many floats as attention_floats returns
    std::uint32_t *row, *position;              // of the tokens
    std::uint32_t *query_rows, *query_position;  // of the rows of query_x
    std::int32_t* source;                       // the tokens of the rows of query_x
    // The rest is for the backward pass.
    Matrix grad, residual, dropped, slope, query_grad, key_value_grad, context_grad, base_grad;
    Matrix normal;   // normalised rows of the adapter's norm
    float* inverse;
};

std::int64_t carve_workspace(Workspace& w, float* memory, const Shape& s, std::int64_t tokens, std::int64_t longest, bool backward) {
    Carver c(memory);
    // A tile of keys may reach beyond the last token.
    const std::int64_t rows = round_up(tokens, ROW_TILE), slack = COLUMNS * COLUMNS;
    const auto matrix = [&](std::int64_t columns) { return Matrix{c.take(rows * columns + slack), rows}; };
    const auto integers = [&] { return reinterpret_cast<std::uint32_t*>(c.take(tokens)); };
    w.x = matrix(s.D), w.query_x = matrix(s.D), w.middle = matrix(s.D);
    if (s.adapter != Adapter::none) w.base = matrix(s.D);
    w.query = matrix(s.A()), w.key_value = matrix(2 * s.A()), w.context = matrix(s.A()), w.inner = matrix(s.I);
    w.attention = c.take(attention_floats(s.head_panels(), longest));
    w.row = integers(), w.position = integers(), w.query_rows = integers(), w.query_position = integers();
    w.source = reinterpret_cast<std::int32_t*>(integers());
    if (backward) {
        w.grad = matrix(s.D), w.residual = matrix(s.D), w.dropped = matrix(s.D), w.slope = matrix(s.I);
        w.normal = matrix(s.D);
        w.query_grad = matrix(s.A()), w.key_value_grad = matrix(2 * s.A()), w.context_grad = matrix(s.A());
        if (s.adapter != Adapter::none) w.base_grad = matrix(s.D);
        w.inverse = c.take(tokens);
    }
    return c.used();
}

[[maybe_unused]] std::int64_t workspace(const Shape& shape, std::int64_t tokens, std::int64_t longest, bool backward) {
    Workspace w{};
    return carve_workspace(w, nullptr, shape, tokens, longest, backward);
}

// The part of a block that one layer computes in one step. Keys and values are computed for all `tokens`, the rest for
// `rows` of them. The rows are all tokens of the sequences [0, whole). If the other states of a last layer are not read,
// they are followed by the last tokens of the sequences [whole, active).
struct Extent {
    std::int64_t active, whole, tokens, rows;

    bool all() const { return rows == tokens; }
};

std::int64_t active_sequences(const Block& b, std::int64_t step) {
    std::int64_t n = 0;
    while (n < b.count && b.sequences[n].depth > step) ++n;
    return n;
}

std::int64_t tokens_of(const Block& b, std::int64_t count) {
    return count == 0 ? 0 : b.sequences[count - 1].start + b.sequences[count - 1].length;
}

Extent extent(const Model& model, const Block& b, std::int64_t step, std::int64_t layer) {
    const std::int64_t active = active_sequences(b, step), tokens = tokens_of(b, active);
    if (layer + 1 < model.shape.layers || model.output == Output::tokens) return {active, active, tokens, tokens};
    const std::int64_t whole = active_sequences(b, step + 1);
    return {active, whole, tokens, tokens_of(b, whole) + active - whole};
}

// The values of one layer in one step that the backward pass reads.
struct KeptNorms {
    Normal first, second;
};

// The tape of a block, entry by entry in the order of the forward pass.
class Tape {
public:
    Tape(const Shape& s, const Block& b) : D_(s.D), normal_(b.normal), inverse_(b.inverse) {}

    KeptNorms next(std::int64_t rows) {
        row_ += rows;
        return before(rows);
    }
    KeptNorms previous(std::int64_t rows) {
        row_ -= rows;
        return at(row_, rows);
    }
    // Returns the entry that ends here.
    KeptNorms before(std::int64_t rows) const { return at(row_ - rows, rows); }

private:
    KeptNorms at(std::int64_t row, std::int64_t rows) const {
        if (!normal_) return {};
        float *const normal = normal_ + row * 2 * D_, *const inverse = inverse_ + row * 2;
        return {{{normal, rows}, inverse}, {{normal + rows * D_, rows}, inverse + rows}};
    }

    std::int64_t D_, row_ = 0;
    float *normal_, *inverse_;
};

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

inline void swap(Matrix& a, Matrix& b) {
    const Matrix old = a;
    a = b;
    b = old;
}

// Calls body(panel, row, v) for rows [from, from + n).
template <class Body>
LARES_INLINE void for_each_vec(std::int64_t panels, std::int64_t from, std::int64_t n, const Body& body) {
    for (std::int64_t p = 0; p < panels; ++p) {
        for (std::int64_t m = from; m < from + n; ++m) {
            for (int v = 0; v < V; ++v) body(p, m, v);
        }
    }
}

// One block with its model and its memory.
struct BlockWorker {
    const Model& model;
    const Block& block;
    Workspace w{};
    std::int64_t panels, inner_panels, attention_panels;

    BlockWorker(const Model& m, const Block& b, float* memory, bool backward)
        : model(m), block(b), panels(m.shape.D / COLUMNS), inner_panels(m.shape.I / COLUMNS), attention_panels(m.shape.A() / COLUMNS) {
        carve_workspace(w, memory, m.shape, b.tokens, b.longest, backward);
        for (std::int64_t i = 0; i < b.count; ++i) {
            const Sequence& s = b.sequences[i];
            for (std::int64_t j = 0; j < s.length; ++j) {
                w.row[s.start + j] = s.row;
                w.position[s.start + j] = static_cast<std::uint32_t>(j);
            }
        }
    }

    DropoutSite site(std::uint32_t which, std::int64_t step, std::int64_t layer) const {
        const Dropout& d = model.dropout;
        const auto address = static_cast<std::uint32_t>((d.first_step + step) << 16 | layer);
        return {d.key, which == SITE_ATTENTION ? d.attention : d.hidden, which, address};
    }

    RowAddresses addresses(const Extent& e) const {
        return e.all() ? RowAddresses{w.row, w.position} : RowAddresses{w.query_rows, w.query_position};
    }

    void load_tokens(const float* from, Matrix to) const {
        for (std::int64_t i = 0; i < block.count; ++i) {
            const Sequence& s = block.sequences[i];
            from_rows(from + s.first * model.shape.D, model.shape.D, s.length, to, s.start);
        }
    }

    void store_tokens(Matrix from, float* to) const {
        for (std::int64_t i = 0; i < block.count; ++i) {
            const Sequence& s = block.sequences[i];
            to_rows(from, s.start, s.length, model.shape.D, to + s.first * model.shape.D);
        }
    }

    // Returns a function that stores the tiles of a product in y.
    static auto to(Matrix y) {
        return [y](std::int64_t p, std::int64_t m, int v, Vec sum) { store(y.at(p, m) + v * W, sum); };
    }

    // Finds the tokens that a last layer computes, and their dropout addresses.
    void choose_rows(const Extent& e) const {
        if (e.all()) return;
        std::int64_t row = 0;
        for (const std::int64_t whole = tokens_of(block, e.whole); row < whole; ++row) w.source[row] = static_cast<std::int32_t>(row);
        for (std::int64_t i = e.whole; i < e.active; ++i) {
            w.source[row++] = static_cast<std::int32_t>(block.sequences[i].start + block.sequences[i].length - 1);
        }
        for (std::int64_t m = 0; m < e.rows; ++m) {
            w.query_rows[m] = w.row[w.source[m]];
            w.query_position[m] = w.position[w.source[m]];
        }
    }

    // Returns the rows of x that choose_rows has found.
    Matrix chosen(const Extent& e) const {
        if (e.all()) return w.x;
        for (std::int64_t p = 0; p < panels; ++p) {
            for (std::int64_t m = 0; m < e.rows; ++m) std::memcpy(w.query_x.at(p, m), w.x.at(p, w.source[m]), sizeof(float) * COLUMNS);
        }
        return w.query_x;
    }

    template <class Each>
    void for_attended(const Extent& e, const Each& visit) const {
        for (std::int64_t i = 0; i < e.active; ++i) {
            const Sequence& s = block.sequences[i];
            if (i < e.whole) {
                visit(AttendedSequence{s.start, s.length, 0, s.start, s.row});
            } else {
                visit(AttendedSequence{s.start, s.length, s.length - 1, tokens_of(block, e.whole) + i - e.whole, s.row});
            }
        }
    }

    Attention attention(std::int64_t step, std::int64_t layer) const {
        const Shape& s = model.shape;
        return {w.query, w.key_value, w.context, w.context_grad, w.query_grad, w.key_value_grad, attention_panels, s.head_panels(),
                1.0f / __builtin_sqrtf(static_cast<float>(s.head())), site(SITE_ATTENTION, step, layer), w.attention};
    }

    // Computes the part of the adapter that is the same in every step.
    void prepare(const float* pre) {
        const AdapterWeights& a = model.adapter;
        if (model.shape.adapter == Adapter::none) return;
        if (model.shape.adapter != Adapter::concat) return load_tokens(pre, w.base);
        load_tokens(pre, w.middle);
        product(w.middle, panels, a.pre, a.bias, panels, 0, block.tokens, to(w.base));
    }

    // Computes x = LN(adapter(x, pre)) for the first `tokens`. The old x is moved to `middle`.
    void enter(std::int64_t tokens, const Normal& normal) {
        const AdapterWeights& a = model.adapter;
        if (model.shape.adapter == Adapter::none) return;
        swap(w.x, w.middle);
        const Vec share = broadcast(a.share), rest = broadcast(1.0f - a.share);
        for (std::int64_t from = 0; from < tokens; from += CHUNK_ROWS) {
            const std::int64_t n = smaller(CHUNK_ROWS, tokens - from);
            const Norm norm{a.scale, a.shift, model.eps};
            if (model.shape.adapter == Adapter::concat) {
                product(w.middle, panels, a.state, nullptr, panels, from, from + n, to(w.x));
                fill_and_normalise(w.x, from, n, panels, norm, normal, [&](std::int64_t p, std::int64_t m, int v) {
                    return add(load(w.x.at(p, m) + v * W), load(w.base.at(p, m) + v * W));
                });
            } else {
                fill_and_normalise(w.x, from, n, panels, norm, normal, [&](std::int64_t p, std::int64_t m, int v) {
                    return fma(load(w.middle.at(p, m) + v * W), share, mul(load(w.base.at(p, m) + v * W), rest));
                });
            }
        }
    }

    void project(const LayerWeights& l, const Extent& e, Matrix query_x) {
        product(w.x, panels, l.key_value, l.key_value_bias, 2 * attention_panels, 0, e.tokens, to(w.key_value));
        product(query_x, panels, l.query, l.query_bias, attention_panels, 0, e.rows, to(w.query));
    }

    // Calls put(row, rows, row of the output, whether the sequence goes on) for the outputs of step `step`.
    template <class Each>
    void for_outputs(std::int64_t step, const Extent& e, const Each& put) const {
        const std::int64_t going_on = active_sequences(block, step + 1);
        for (std::int64_t i = 0; i < e.active; ++i) {
            const Sequence& s = block.sequences[i];
            const bool ends = i >= going_on;
            const std::int64_t last = i < e.whole ? s.start + s.length - 1 : tokens_of(block, e.whole) + i - e.whole;
            if (model.output == Output::steps) {
                put(last, 1, s.out + step, !ends);
            } else if (ends && model.output == Output::last) {
                put(last, 1, s.out, false);
            } else if (ends) {
                put(s.start, s.length, s.out, false);
            }
        }
    }
};

}  // namespace
}  // namespace lares_fast
