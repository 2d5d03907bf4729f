// Operations on rows: dropout, residual and LayerNorm, forward and backward.
#pragma once

#include "recurrence/dropout.h"
#include "recurrence/product.h"

namespace lares_fast {
namespace {

// Rows that are computed together. They stay in the L1 cache from a product to its LayerNorm.
constexpr std::int64_t CHUNK_ROWS = 8 * ROW_TILE;
constexpr std::int64_t MAX_PANELS = 16;  // D is at most 256

// The dropout addresses of the rows of a matrix.
struct RowAddresses {
    const std::uint32_t *row, *position;
};

// The dropout decisions for the rows of a chunk.
using Decisions = Keep[MAX_PANELS][CHUNK_ROWS][DRAWS];

inline void decide(const DropoutSite& at, RowAddresses rows, std::int64_t from, std::int64_t n, std::int64_t panels, Decisions& kept) {
    if (!at.threshold) return;
    static_assert(CHUNK_ROWS % DRAWN == 0, "the last rows of a chunk are drawn within it");
    for (std::int64_t i = 0; i < n; i += DRAWN) {
        std::uint32_t row[DRAWN], position[DRAWN];
        for (int d = 0; d < DRAWN; ++d) {
            const std::int64_t m = from + (i + d < n ? i + d : i);
            row[d] = rows.row[m], position[d] = rows.position[m];
        }
        draw_hidden(at, row, position, panels, CHUNK_ROWS, kept[0] + i);
    }
}

struct Norm {
    const float *scale, *shift;
    float eps;
};

// Normalised rows and their reciprocal deviations, which the backward pass reads. Null if there will be none.
struct Normal {
    Matrix rows;
    float* inverse;
};

// Computes y = LN(y) for the rows [from, from + n), n <= CHUNK_ROWS, whose means are known. Each pass covers all rows:
// within one row, each sum would wait for the one before it.
inline void normalise(Matrix y, std::int64_t from, std::int64_t n, std::int64_t panels, const float (&mean)[CHUNK_ROWS], const Norm& norm,
                      const Normal& normal) {
    float inverse[CHUNK_ROWS];
    for (std::int64_t i = 0; i < n; ++i) {
        const Vec centre = broadcast(mean[i]);
        Vec squares[V];
        for (int v = 0; v < V; ++v) squares[v] = broadcast(0.0f);
        for (std::int64_t p = 0; p < panels; ++p) {
            for (int v = 0; v < V; ++v) {
                const Vec d = sub(load(y.at(p, from + i) + v * W), centre);
                squares[v] = fma(d, d, squares[v]);
            }
        }
        for (int v = 1; v < V; ++v) squares[0] = add(squares[0], squares[v]);
        inverse[i] = sum(squares[0]);
    }
    const float columns = static_cast<float>(panels * COLUMNS);
    for (std::int64_t i = 0; i < n; ++i) inverse[i] = 1.0f / __builtin_sqrtf(inverse[i] / columns + norm.eps);
    if (normal.inverse) std::memcpy(normal.inverse + from, inverse, sizeof(float) * static_cast<std::size_t>(n));
    for (std::int64_t p = 0; p < panels; ++p) {
        for (int v = 0; v < V; ++v) {
            const Vec scale = load(norm.scale + p * COLUMNS + v * W), shift = load(norm.shift + p * COLUMNS + v * W);
            float* const place = y.at(p, from) + v * W;
            float* const kept = normal.inverse ? normal.rows.at(p, from) + v * W : nullptr;
            for (std::int64_t i = 0; i < n; ++i) {
                const Vec value = mul(sub(load(place + i * COLUMNS), broadcast(mean[i])), broadcast(inverse[i]));
                if (kept) store(kept + i * COLUMNS, value);
                store(place + i * COLUMNS, fma(value, scale, shift));
            }
        }
    }
}

// Fills y with `value(panel, row, v)` and normalises it, for the rows [from, from + n).
template <class Value>
LARES_INLINE void fill_and_normalise(Matrix y, std::int64_t from, std::int64_t n, std::int64_t panels, const Norm& norm, const Normal& normal,
                                     const Value& value) {
    float mean[CHUNK_ROWS];
    for (std::int64_t i = 0; i < n; ++i) {
        Vec total[V];
        for (int v = 0; v < V; ++v) total[v] = broadcast(0.0f);
        for (std::int64_t p = 0; p < panels; ++p) {
            for (int v = 0; v < V; ++v) {
                const Vec x = value(p, from + i, v);
                store(y.at(p, from + i) + v * W, x);
                total[v] = add(total[v], x);
            }
        }
        for (int v = 1; v < V; ++v) total[0] = add(total[0], total[v]);
        mean[i] = sum(total[0]);
    }
    for (std::int64_t i = 0; i < n; ++i) mean[i] /= static_cast<float>(panels * COLUMNS);
    normalise(y, from, n, panels, mean, norm, normal);
}

// Computes x = xhat * scale + shift for `rows` rows.
inline void unnormalise(Matrix xhat, std::int64_t rows, std::int64_t panels, const float* scale, const float* shift, Matrix x) {
    for (std::int64_t p = 0; p < panels; ++p) {
        for (int v = 0; v < V; ++v) {
            const Vec a = load(scale + p * COLUMNS + v * W), b = load(shift + p * COLUMNS + v * W);
            for (std::int64_t m = 0; m < rows; ++m) store(x.at(p, m) + v * W, fma(load(xhat.at(p, m) + v * W), a, b));
        }
    }
}

struct NormGradients {
    float *scale, *shift;
    float* bias;  // gradient of the bias of the product before the dropout, or null
};

// The gradient of y = LN(dropout(f) + residual) for `rows` rows. `to` receives the gradient of the residual and may be
// `grad`. `dropped` receives the gradient of f, unless its data is null.
inline void normalise_backward(Matrix grad, const Normal& normal, const float* scale, std::int64_t rows, std::int64_t panels,
                               const DropoutSite& at, RowAddresses addresses, Matrix to, Matrix dropped, const NormGradients& sums) {
    const float columns = static_cast<float>(panels * COLUMNS);
    Decisions kept;
    for (std::int64_t from = 0; from < rows; from += CHUNK_ROWS) {
        const std::int64_t n = rows - from < CHUNK_ROWS ? rows - from : CHUNK_ROWS;
        float mean[CHUNK_ROWS], slope[CHUNK_ROWS];
        for (std::int64_t i = 0; i < n; ++i) {
            Vec total = broadcast(0.0f), product = broadcast(0.0f);
            for (std::int64_t p = 0; p < panels; ++p) {
                for (int v = 0; v < V; ++v) {
                    const Vec g = mul(load(grad.at(p, from + i) + v * W), load(scale + p * COLUMNS + v * W));
                    total = add(total, g);
                    product = fma(g, load(normal.rows.at(p, from + i) + v * W), product);
                }
            }
            mean[i] = sum(total);
            slope[i] = sum(product);
        }
        for (std::int64_t i = 0; i < n; ++i) mean[i] /= columns, slope[i] /= columns;
        if (dropped.data) decide(at, addresses, from, n, panels, kept);
        for (std::int64_t p = 0; p < panels; ++p) {
            for (int v = 0; v < V; ++v) {
                const std::int64_t column = p * COLUMNS + v * W;
                const Vec a = load(scale + column), factor = broadcast(at.scale);
                Vec scale_sum = broadcast(0.0f), shift_sum = broadcast(0.0f), bias_sum = broadcast(0.0f);
                for (std::int64_t i = 0; i < n; ++i) {
                    const std::int64_t m = from + i;
                    const Vec g = load(grad.at(p, m) + v * W), xhat = load(normal.rows.at(p, m) + v * W);
                    shift_sum = add(shift_sum, g);
                    scale_sum = fma(g, xhat, scale_sum);
                    const Vec centred = sub(mul(g, a), fma(xhat, broadcast(slope[i]), broadcast(mean[i])));
                    const Vec d = mul(centred, broadcast(normal.inverse[m]));
                    store(to.at(p, m) + v * W, d);
                    if (dropped.data) {
                        const Vec f = at.threshold ? mul(select(kept[p][i] + v * W, d), factor) : d;
                        store(dropped.at(p, m) + v * W, f);
                        bias_sum = add(bias_sum, f);
                    }
                }
                store(sums.scale + column, add(load(sums.scale + column), scale_sum));
                store(sums.shift + column, add(load(sums.shift + column), shift_sum));
                if (dropped.data) store(sums.bias + column, add(load(sums.bias + column), bias_sum));
            }
        }
    }
}

// Copy the rows [first, first + rows) from a row-major matrix [., D] to panels, and back.
inline void from_rows(const float* source, std::int64_t D, std::int64_t rows, Matrix to, std::int64_t first) {
    for (std::int64_t m = 0; m < rows; ++m) {
        for (std::int64_t p = 0; p < D / COLUMNS; ++p) {
            std::memcpy(to.at(p, first + m), source + m * D + p * COLUMNS, sizeof(float) * COLUMNS);
        }
    }
}

inline void to_rows(Matrix from, std::int64_t first, std::int64_t rows, std::int64_t D, float* target) {
    for (std::int64_t m = 0; m < rows; ++m) {
        for (std::int64_t p = 0; p < D / COLUMNS; ++p) {
            std::memcpy(target + m * D + p * COLUMNS, from.at(p, first + m), sizeof(float) * COLUMNS);
        }
    }
}

}  // namespace
}  // namespace lares_fast
