// The gradients of one block, from its last step and layer to the first one.
#pragma once

#include "recurrence/block.h"
#include "recurrence/gelu.h"

namespace lares_fast {
namespace {

struct Backward : BlockWorker {
    Backward(const Model& m, const Block& b, float* memory) : BlockWorker(m, b, memory, true) {}

    // Fetches the rows of `ahead`, which no cache holds, during the product.
    auto plus_residual(Matrix y, Matrix ahead) const {
        const Matrix residual = w.residual;
        return [=](std::int64_t p, std::int64_t m, int v, Vec sum) {
            store(y.at(p, m) + v * W, add(sum, load(residual.at(p, m) + v * W)));
            if (v == 0) __builtin_prefetch(ahead.at(p, m));
        };
    }

    // `grad` holds the gradient of the layer's output and receives the gradient of its input. `recompute` computes x again.
    // `before` is the previous entry of the tape, which is read next.
    template <class Recompute>
    void layer_backward(std::int64_t step, std::int64_t layer, const Extent& e, const KeptNorms& kept, const KeptNorms& before,
                        const LayerGradients& sums, const Recompute& recompute) {
        const LayerWeights& l = model.layers[layer];
        choose_rows(e);
        const auto normalise_backward_at = [&](std::uint32_t which, const Normal& normal, const float* scale, const NormGradients& to_sums) {
            const DropoutSite at = site(which, step, layer);
            normalise_backward(w.grad, normal, scale, e.rows, panels, at, addresses(e), w.residual, w.dropped, to_sums);
        };
        normalise_backward_at(AFTER_FEED_FORWARD, kept.second, l.scale2, {sums.scale2, sums.shift2, sums.down_bias});
        unnormalise(kept.first.rows, e.rows, panels, l.scale1, l.shift1, w.middle);
        product(w.middle, panels, l.up, l.up_bias, inner_panels, 0, e.rows, to(w.inner),
                [&](std::int64_t p, std::int64_t m, std::int64_t rows) { gelu_and_slope_all(w.inner.at(p, m), rows * COLUMNS, w.slope.at(p, m)); });
        accumulate(w.dropped, panels, w.inner, inner_panels, e.rows, sums.down);
        product(w.dropped, panels, l.down_back, nullptr, inner_panels, 0, e.rows, [&](std::int64_t p, std::int64_t m, int v, Vec sum) {
            float* const place = w.slope.at(p, m) + v * W;
            store(place, mul(sum, load(place)));
        });
        accumulate_rows(w.slope, inner_panels, e.rows, sums.up_bias);
        accumulate(w.slope, inner_panels, w.middle, panels, e.rows, sums.up);
        product(w.slope, inner_panels, l.up_back, nullptr, panels, 0, e.rows, plus_residual(w.grad, before.second.rows));
        normalise_backward_at(AFTER_ATTENTION, kept.first, l.scale1, {sums.scale1, sums.shift1, sums.output_bias});

        recompute();
        const Matrix x = chosen(e);
        project(l, e, x);
        product(w.dropped, panels, l.output_back, nullptr, attention_panels, 0, e.rows, to(w.context_grad));
        for (std::int64_t p = 0; p < 2 * attention_panels; ++p) {
            std::memset(w.key_value_grad.at(p, 0), 0, sizeof(float) * static_cast<std::size_t>(e.tokens * COLUMNS));
        }
        const Attention a = attention(step, layer);
        for_attended(e, [&](const AttendedSequence& s) { attend_backward(a, s); });
        accumulate(w.dropped, panels, w.context, attention_panels, e.rows, sums.output);
        accumulate(w.query_grad, attention_panels, x, panels, e.rows, sums.query);
        accumulate_rows(w.query_grad, attention_panels, e.rows, sums.query_bias);
        accumulate(w.key_value_grad, 2 * attention_panels, w.x, panels, e.tokens, sums.key_value);
        // The gradient of a key's bias is zero, because that bias does not change the softmax. Only the bias of the values
        // has a sum.
        const Matrix value_grad{w.key_value_grad.at(attention_panels, 0), w.key_value_grad.rows};
        accumulate_rows(value_grad, attention_panels, e.tokens, sums.key_value_bias + attention_panels * COLUMNS);
        product(w.key_value_grad, 2 * attention_panels, l.key_value_back, nullptr, panels, 0, e.tokens, to(w.grad));
        product(w.query_grad, attention_panels, l.query_back, nullptr, panels, 0, e.rows, plus_residual(w.residual, before.first.rows));
        for_each_vec(panels, 0, e.rows, [&](std::int64_t p, std::int64_t m, int v) {
            float* const place = w.grad.at(p, e.all() ? m : w.source[m]) + v * W;
            store(place, add(load(place), load(w.residual.at(p, m) + v * W)));
        });
    }

    // Adds the gradient of the output to the gradient of the states that continue.
    void add_output_gradient(std::int64_t step, const Extent& e, const float* out_grad) const {
        for_outputs(step, e, [&](std::int64_t row, std::int64_t rows, std::int64_t out_row, bool goes_on) {
            const float* const from = out_grad + out_row * model.shape.D;
            if (!goes_on) return from_rows(from, model.shape.D, rows, w.grad, row);
            for_each_vec(panels, row, rows, [&](std::int64_t p, std::int64_t m, int v) {
                float* const place = w.grad.at(p, m) + v * W;
                store(place, add(load(place), load(from + (m - row) * model.shape.D + p * COLUMNS + v * W)));
            });
        });
    }

    // Returns the sum of grad (state - pre). It is one number with a term for every element, and its terms may cancel, so
    // terms and sums are fp64.
    double share_gradient(std::int64_t tokens) const {
        double lanes[COLUMNS] = {};
        for (std::int64_t p = 0; p < panels; ++p) {
            for (std::int64_t m = 0; m < tokens; ++m) {
                const float *const g = w.grad.at(p, m), *const state = w.middle.at(p, m), *const base = w.base.at(p, m);
                for (std::int64_t c = 0; c < COLUMNS; ++c) lanes[c] += double{g[c]} * (double{state[c]} - double{base[c]});
            }
        }
        double total = 0.0;
        for (const double lane : lanes) total += lane;
        return total;
    }

    // Turns the gradient of a step's x into the gradient of the state before, for the first `tokens`. `middle` holds that
    // state.
    void enter_backward(std::int64_t tokens, const AdapterGradients& sums) {
        const AdapterWeights& a = model.adapter;
        if (model.shape.adapter == Adapter::none) return;
        normalise_backward(w.grad, {w.normal, w.inverse}, a.scale, tokens, panels, site(0, 0, 0), {}, w.grad, {}, {sums.scale, sums.shift, nullptr});
        if (model.shape.adapter == Adapter::concat) accumulate(w.grad, panels, w.middle, panels, tokens, sums.state);
        if (model.shape.adapter == Adapter::linear) *sums.share += share_gradient(tokens);
        for_each_vec(panels, 0, tokens, [&](std::int64_t p, std::int64_t m, int v) {
            const Vec g = load(w.grad.at(p, m) + v * W);
            float* const place = w.base_grad.at(p, m) + v * W;
            store(place, add(load(place), g));
            if (model.shape.adapter != Adapter::concat) store(w.grad.at(p, m) + v * W, mul(g, broadcast(a.share)));
        });
        if (model.shape.adapter == Adapter::concat) {
            product(w.grad, panels, a.state_back, nullptr, panels, 0, tokens, to(w.residual));
            swap(w.grad, w.residual);
        }
    }

    void prepare_backward(const float* pre, float* pre_grad, const AdapterGradients& sums) {
        const AdapterWeights& a = model.adapter;
        if (model.shape.adapter == Adapter::none) return;
        if (model.shape.adapter == Adapter::concat) {
            load_tokens(pre, w.middle);
            accumulate(w.base_grad, panels, w.middle, panels, block.tokens, sums.pre);
            accumulate_rows(w.base_grad, panels, block.tokens, sums.bias);
            product(w.base_grad, panels, a.pre_back, nullptr, panels, 0, block.tokens, to(w.x));
        } else {
            for_each_vec(panels, 0, block.tokens, [&](std::int64_t p, std::int64_t m, int v) {
                store(w.x.at(p, m) + v * W, mul(load(w.base_grad.at(p, m) + v * W), broadcast(1.0f - a.share)));
            });
        }
        store_tokens(w.x, pre_grad);
    }
};

void backward(const Model& model, const Block& block, const float* h, const float* pre, const float* out_grad, float* h_grad, float* pre_grad,
              const Gradients& sums, float* memory) {
    Backward worker(model, block, memory);
    Workspace& w = worker.w;
    Tape tape(model.shape, block);
    const std::int64_t steps = block.sequences[0].depth, layers = model.shape.layers;
    for (std::int64_t step = 0; step < steps; ++step) {
        for (std::int64_t layer = 0; layer < layers; ++layer) tape.next(extent(model, block, step, layer).rows);
    }
    worker.prepare(pre);
    if (w.base_grad.data) std::memset(w.base_grad.data, 0, sizeof(float) * static_cast<std::size_t>(w.base_grad.rows * model.shape.D));
    for (std::int64_t step = steps - 1; step >= 0; --step) {
        worker.add_output_gradient(step, extent(model, block, step, layers - 1), out_grad);
        for (std::int64_t layer = layers - 1; layer >= 0; --layer) {
            const Extent e = extent(model, block, step, layer);
            const KeptNorms kept = tape.previous(e.rows);
            const bool first = step == 0 && layer == 0;
            const std::int64_t layer_before = layer > 0 ? layer - 1 : layers - 1;
            // The first entry has no previous one. In its place the rows of the first entry are fetched, and they are not used.
            const KeptNorms before = first ? kept : tape.before(extent(model, block, layer > 0 ? step : step - 1, layer_before).rows);
            worker.layer_backward(step, layer, e, kept, before, sums.layers[layer], [&] {
                if (first) {
                    worker.load_tokens(h, w.x);
                } else {
                    const LayerWeights& l = model.layers[layer_before];
                    unnormalise(before.second.rows, e.tokens, worker.panels, l.scale2, l.shift2, w.x);
                }
                if (layer == 0) worker.enter(e.tokens, {w.normal, w.inverse});
            });
        }
        worker.enter_backward(tokens_of(block, active_sequences(block, step)), sums.adapter);
    }
    worker.store_tokens(w.grad, h_grad);
    worker.prepare_backward(pre, pre_grad, sums.adapter);
}

}  // namespace
}  // namespace lares_fast
