// All steps of one block.
#pragma once

#include "recurrence/block.h"
#include "recurrence/gelu.h"

namespace lares_fast {
namespace {

struct Forward : BlockWorker {
    Forward(const Model& m, const Block& b, float* memory) : BlockWorker(m, b, memory, false) {}

    // Computes y = LN(dropout(input B + bias) + residual).
    void project_and_normalise(Matrix input, std::int64_t input_panels, const float* b, const float* bias, const DropoutSite& at,
                               const Extent& e, Matrix residual, Matrix y, const Norm& norm, const Normal& normal) {
        Decisions kept;
        // The rows to be written are in no cache. They are fetched during the product.
        const Matrix ahead = normal.inverse ? normal.rows : y;
        for (std::int64_t from = 0; from < e.rows; from += CHUNK_ROWS) {
            const std::int64_t n = smaller(CHUNK_ROWS, e.rows - from);
            product(input, input_panels, b, bias, panels, from, from + n, [&](std::int64_t p, std::int64_t m, int v, Vec sum) {
                store(y.at(p, m) + v * W, sum);
                if (v == 0) __builtin_prefetch(ahead.at(p, m), 1);
            });
            decide(at, addresses(e), from, n, panels, kept);
            if (at.threshold) {
                const Vec scale = broadcast(at.scale);
                fill_and_normalise(y, from, n, panels, norm, normal, [&](std::int64_t p, std::int64_t m, int v) {
                    return fma(select(kept[p][m - from] + v * W, load(y.at(p, m) + v * W)), scale, load(residual.at(p, m) + v * W));
                });
            } else {
                fill_and_normalise(y, from, n, panels, norm, normal, [&](std::int64_t p, std::int64_t m, int v) {
                    return add(load(y.at(p, m) + v * W), load(residual.at(p, m) + v * W));
                });
            }
        }
    }

    void layer_forward(std::int64_t step, std::int64_t layer, const Extent& e, const KeptNorms& kept) {
        const LayerWeights& l = model.layers[layer];
        choose_rows(e);
        const Matrix x = chosen(e);
        project(l, e, x);
        const Attention a = attention(step, layer);
        for_attended(e, [&](const AttendedSequence& s) { attend(a, s); });
        project_and_normalise(w.context, attention_panels, l.output, l.output_bias, site(AFTER_ATTENTION, step, layer), e, x, w.middle,
              {l.scale1, l.shift1, model.eps}, kept.first);
        product(w.middle, panels, l.up, l.up_bias, inner_panels, 0, e.rows, to(w.inner),
                [&](std::int64_t p, std::int64_t m, std::int64_t rows) { gelu_all(w.inner.at(p, m), rows * COLUMNS); });
        project_and_normalise(w.inner, inner_panels, l.down, l.down_bias, site(AFTER_FEED_FORWARD, step, layer), e, w.middle, w.x,
              {l.scale2, l.shift2, model.eps}, kept.second);
    }

    // Copies the states that are read from x, where a last layer has computed chosen rows only, to the output.
    void write_outputs(std::int64_t step, float* out) const {
        const Extent e = extent(model, block, step, model.shape.layers - 1);
        for_outputs(step, e, [&](std::int64_t row, std::int64_t rows, std::int64_t out_row, bool) {
            to_rows(w.x, row, rows, model.shape.D, out + out_row * model.shape.D);
        });
    }
};

void forward(const Model& model, const Block& block, const float* h, const float* pre, float* out, float* memory) {
    Forward worker(model, block, memory);
    Tape tape(model.shape, block);
    worker.prepare(pre);
    worker.load_tokens(h, worker.w.x);
    for (std::int64_t step = 0; step < block.sequences[0].depth; ++step) {
        worker.enter(tokens_of(block, active_sequences(block, step)), {});
        for (std::int64_t layer = 0; layer < model.shape.layers; ++layer) {
            const Extent e = extent(model, block, step, layer);
            worker.layer_forward(step, layer, e, tape.next(e.rows));
        }
        worker.write_outputs(step, out);
    }
}

}  // namespace
}  // namespace lares_fast
