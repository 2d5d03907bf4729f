// Row by row: dropout, residual and LayerNorm, forward and backward.
#pragma once

#include "recurrence/keep_bits.h"
#include "recurrence/product.h"

namespace lares_fast {
namespace {

// Rows that are worked on together stay in the L1 cache from a product to its LayerNorm.
constexpr std::int64_t CHUNK = 8 * ROW_TILE;
constexpr std::int64_t MAX_PANELS = 16;  // D up to 256

// The dropout addresses of the rows of a matrix.
struct RowAddresses {
    const std::uint32_t *row, *position;
};

using KeepBits = std::uint16_t[MAX_PANELS][CHUNK];

// Bits of the rows [from, from + n); bit 1 for all of them where nothing is dropped.
inline void chunk_bits(const Site& at, RowAddresses rows, std::int64_t from, std::int64_t n, std::int64_t panels, KeepBits& bits) {
    if (at.threshold == 0) {
        std::memset(bits, 0xff, sizeof bits);
        return;
    }
    for (std::int64_t i = 0; i < n; ++i) draw_hidden(at, rows.row[from + i], rows.position[from + i], panels, CHUNK, &bits[0][i]);
}

LARES_INLINE Mask lanes(std::uint16_t bits, int v) { return (static_cast<Mask>(bits) >> (v * W)) & ALL; }

struct Norm {
    const float *scale, *shift;
    float eps;
};

// Normalised rows and their reciprocal deviations, kept for the backward; or nulls.
struct Normal {
    Matrix rows;
    float* inverse;
};

// y = LN(y) on row `m`, whose lanes add up to `total`.
LARES_INLINE void normalise(Matrix y, std::int64_t m, std::int64_t panels, Vec total, const Norm& norm, const Normal& normal) {
    const float columns = static_cast<float>(panels * COLUMNS);
    const Vec centre = broadcast(sum(total) / columns);
    Vec squares = broadcast(0.0f);
    for (std::int64_t p = 0; p < panels; ++p) {
        for (int v = 0; v < V; ++v) {
            const Vec d = sub(load(y.at(p, m) + v * W), centre);
            squares = fma(d, d, squares);
        }
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / columns + norm.eps);
    if (normal.inverse) normal.inverse[m] = inverse;
    const Vec factor = broadcast(inverse);
    for (std::int64_t p = 0; p < panels; ++p) {
        for (int v = 0; v < V; ++v) {
            float* const place = y.at(p, m) + v * W;
            const Vec value = mul(sub(load(place), centre), factor);
            if (normal.rows.data) store(normal.rows.at(p, m) + v * W, value);
            store(place, fma(value, load(norm.scale + p * COLUMNS + v * W), load(norm.shift + p * COLUMNS + v * W)));
        }
    }
}

// y = LN(dropout(y) + residual) for the rows [from, from + n) of y.
inline void drop_add_normalise(Matrix y, Matrix residual, std::int64_t from, std::int64_t n, std::int64_t panels, const KeepBits& bits,
                               float kept, const Norm& norm, const Normal& normal) {
    const Vec factor = broadcast(kept);
    for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t m = from + i;
        Vec total = broadcast(0.0f);
        for (std::int64_t p = 0; p < panels; ++p) {
            for (int v = 0; v < V; ++v) {
                float* const place = y.at(p, m) + v * W;
                const Vec sum = fma(select(lanes(bits[p][i], v), load(place)), factor, load(residual.at(p, m) + v * W));
                store(place, sum);
                total = add(total, sum);
            }
        }
        normalise(y, m, panels, total, norm, normal);
    }
}

// x = xhat * scale + shift for `rows` rows.
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
    float* bias;  // of the product whose dropout the norm follows, or null
};

// The gradient of y = LN(dropout(f) + residual) on `rows` rows: of the residual in `to`, which may be `grad`, and of f in
// `dropped`, unless its data is null.
inline void normalise_backward(Matrix grad, const Normal& normal, const float* scale, std::int64_t rows, std::int64_t panels,
                               const Site& at, RowAddresses addresses, Matrix to, Matrix dropped, const NormGradients& sums) {
    const float columns = static_cast<float>(panels * COLUMNS), kept = kept_scale(at.threshold);
    KeepBits bits;
    for (std::int64_t from = 0; from < rows; from += CHUNK) {
        const std::int64_t n = rows - from < CHUNK ? rows - from : CHUNK;
        float mean[CHUNK], slope[CHUNK];
        for (std::int64_t i = 0; i < n; ++i) {
            Vec total = broadcast(0.0f), product = broadcast(0.0f);
            for (std::int64_t p = 0; p < panels; ++p) {
                for (int v = 0; v < V; ++v) {
                    const Vec g = mul(load(grad.at(p, from + i) + v * W), load(scale + p * COLUMNS + v * W));
                    total = add(total, g);
                    product = fma(g, load(normal.rows.at(p, from + i) + v * W), product);
                }
            }
            mean[i] = sum(total) / columns;
            slope[i] = sum(product) / columns;
        }
        if (dropped.data) chunk_bits(at, addresses, from, n, panels, bits);
        for (std::int64_t p = 0; p < panels; ++p) {
            for (int v = 0; v < V; ++v) {
                const std::int64_t column = p * COLUMNS + v * W;
                const Vec a = load(scale + column), factor = broadcast(kept);
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
                        const Vec f = mul(select(lanes(bits[p][i], v), d), factor);
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

// Rows [first, first + rows) of a row-major [., D] to panels, and back.
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
