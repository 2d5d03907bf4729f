// Causal attention of one head of one sequence. It takes four queries at a time, because four queries share their dropout
// draws.
#pragma once

#include "recurrence/dropout.h"
#include "recurrence/product.h"
#include "simd/exp2.h"

namespace lares_fast {
namespace {

constexpr int QUAD = 4;

struct Attention {
    Matrix query;      // [rows, A]
    Matrix key_value;  // [tokens, 2 A]: keys, then values
    Matrix context;    // [rows, A]
    // The rest is for the backward pass: the gradient of the context, and the gradients computed from it.
    Matrix context_grad, query_grad, key_value_grad;
    std::int64_t panels, head_panels;  // panels of A, and of a head
    float scale;                       // factor of the scores
    DropoutSite dropout;
    float* scratch;  // as many floats as attention_floats returns
};

// One sequence. Its queries are the positions from `query` on, and the rows of Attention::query from `query_row` on.
struct AttendedSequence {
    std::int64_t first, length, query, query_row;
    std::uint32_t row;
};

// Workspace of a head: keys and values, transposed, and rows of a quad over all keys. The rows hold probabilities,
// probabilities after dropout, and gradients.
inline std::int64_t attention_floats(std::int64_t head_panels, std::int64_t longest) {
    const std::int64_t keys = round_up(longest, COLUMNS);
    return keys * (2 * head_panels * COLUMNS + 3 * QUAD);
}

struct HeadScratch {
    float *keys, *values;  // [tile][column of the head][16 keys]
    float *rows[3];        // [QUAD][stride]
    std::int64_t stride;
};

// Writes tiles[(tile * width + column) * 16 + key] from the panels [panel, panel + head_panels).
LARES_INLINE void transpose_head(Matrix from, std::int64_t panel, std::int64_t head_panels, std::int64_t first, std::int64_t length, float* tiles) {
    const std::int64_t width = head_panels * COLUMNS;
    for (std::int64_t key = 0; key < length; key += W) {
        float* const tile = tiles + key / COLUMNS * width * COLUMNS + key % COLUMNS;
        for (std::int64_t p = 0; p < head_panels; ++p) {
            const float* const rows = from.at(panel + p, first + key);
            for (std::int64_t c = 0; c < COLUMNS; c += 4) {
                Vec columns[4];
                transpose4([=](int r) { return rows + r * COLUMNS + c; }, columns);
                for (int i = 0; i < 4; ++i) store(tile + (p * COLUMNS + c + i) * COLUMNS, columns[i]);
            }
        }
    }
}

// The number of chains that a tile of `sums` registers is split into. A multiply-add waits for the one before it in its
// chain.
constexpr int chains(int sums) { return sums >= 8 ? 1 : sums >= 4 ? 2 : 4; }

// Multiplies N rows of x with the first REGISTERS * W keys of one transposed tile: out[r * stride + key]. Each panel has
// sums of its own, as in a product.
template <int N, int REGISTERS>
LARES_INLINE void times_tile(Matrix x, std::int64_t panel, std::int64_t row, const float* tile, std::int64_t head_panels, float* out,
                             std::int64_t stride) {
    constexpr int C = chains(N * REGISTERS);
    for (std::int64_t p = 0; p < head_panels; ++p, tile += COLUMNS * COLUMNS) {
        Vec sums[C][N][REGISTERS];
        const float* const factors = x.at(panel + p, row);
#pragma GCC unroll 16
        for (int k = 0; k < COLUMNS; ++k) {
            for (int v = 0; v < REGISTERS; ++v) {
                const Vec column = load(tile + k * COLUMNS + v * W);
                for (int r = 0; r < N; ++r) {
                    const Vec factor = broadcast(factors[r * COLUMNS + k]);
                    sums[k % C][r][v] = k < C ? mul(factor, column) : fma(factor, column, sums[k % C][r][v]);
                }
            }
        }
        for (int r = 0; r < N; ++r) {
            for (int v = 0; v < REGISTERS; ++v) {
                for (int c = 1; c < C; ++c) sums[0][r][v] = add(sums[0][r][v], sums[c][r][v]);
                float* const place = out + r * stride + v * W;
                store(place, p == 0 ? sums[0][r][v] : add(load(place), sums[0][r][v]));
            }
        }
    }
}

// Calls times_tile for all tiles of the first `keys` keys.
template <int N>
LARES_INLINE void times_tiles(Matrix x, std::int64_t panel, std::int64_t row, const float* tiles, std::int64_t head_panels, std::int64_t keys,
                              float* out, std::int64_t stride) {
    for (; keys > 0; keys -= COLUMNS, tiles += head_panels * COLUMNS * COLUMNS, out += COLUMNS) {
        if (2 * W == COLUMNS && keys <= W) {
            times_tile<N, 1>(x, panel, row, tiles, head_panels, out, stride);
        } else {
            times_tile<N, V>(x, panel, row, tiles, head_panels, out, stride);
        }
    }
}

// Multiplies N rows of weights [r * stride + key] with the first `keys` rows of x. Row r of the product is multiplied by
// factor[r].
template <int N>
LARES_INLINE void times_rows(const float* weights, std::int64_t stride, Matrix x, std::int64_t x_panel, std::int64_t first, std::int64_t keys,
                             std::int64_t head_panels, const float* factor, Matrix out, std::int64_t out_panel, std::int64_t row) {
    constexpr int C = chains(N * V);
    for (std::int64_t p = 0; p < head_panels; ++p) {
        Vec sums[C][N][V];
        for (int c = 0; c < C; ++c) {
            for (int r = 0; r < N; ++r) {
                for (int v = 0; v < V; ++v) sums[c][r][v] = broadcast(0.0f);
            }
        }
        const float* const from = x.at(x_panel + p, first);
        const auto key = [&](std::int64_t j, int c) __attribute__((always_inline)) {
            Vec value[V];
            for (int v = 0; v < V; ++v) value[v] = load(from + j * COLUMNS + v * W);
            for (int r = 0; r < N; ++r) {
                const Vec weight = broadcast(weights[r * stride + j]);
                for (int v = 0; v < V; ++v) sums[c][r][v] = fma(weight, value[v], sums[c][r][v]);
            }
        };
        std::int64_t j = 0;
        for (; j + C <= keys; j += C) {
            for (int c = 0; c < C; ++c) key(j + c, c);
        }
        for (; j < keys; ++j) key(j, 0);
        for (int r = 0; r < N; ++r) {
            for (int v = 0; v < V; ++v) {
                for (int c = 1; c < C; ++c) sums[0][r][v] = add(sums[0][r][v], sums[c][r][v]);
                store(out.at(out_panel + p, row + r) + v * W, mul(sums[0][r][v], broadcast(factor[r])));
            }
        }
    }
}

// Adds weights^T [keys, N] times N rows of x to the rows [first, first + keys) of out.
template <int N>
LARES_INLINE void add_outer(const float* weights, std::int64_t stride, Matrix x, std::int64_t x_panel, std::int64_t row, std::int64_t keys,
                            std::int64_t head_panels, Matrix out, std::int64_t out_panel, std::int64_t first) {
    for (std::int64_t p = 0; p < head_panels; ++p) {
        Vec rows[N][V];
        for (int r = 0; r < N; ++r) {
            for (int v = 0; v < V; ++v) rows[r][v] = load(x.at(x_panel + p, row + r) + v * W);
        }
        float* const to = out.at(out_panel + p, first);
#pragma GCC unroll 2
        for (std::int64_t j = 0; j < keys; ++j) {
            for (int v = 0; v < V; ++v) {
                Vec sum = load(to + j * COLUMNS + v * W);
                for (int r = 0; r < N; ++r) sum = fma(broadcast(weights[r * stride + j]), rows[r][v], sum);
                store(to + j * COLUMNS + v * W, sum);
            }
        }
    }
}

constexpr float LOG2_E = 1.44269504f;

// Returns numbers to add to a register. They keep the first `n` lanes and turn the others into -infinity, or into NaN,
// which `max` ignores.
LARES_INLINE const float* first_of(std::int64_t n) {
    constexpr float LEAST = -__builtin_inff();
    static constexpr float VISIBLE_LANES[2 * COLUMNS] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, LEAST, LEAST, LEAST, LEAST, LEAST, LEAST,
                                                    LEAST, LEAST, LEAST, LEAST, LEAST, LEAST, LEAST, LEAST, LEAST, LEAST};
    return VISIBLE_LANES + COLUMNS - n;
}

LARES_INLINE float largest_of(const float* row, std::int64_t n) {
    Vec top = broadcast(-__builtin_inff());
    std::int64_t j = 0;
    for (; j + W <= n; j += W) top = max(load(row + j), top);
    if (j < n) top = max(add(load(row + j), load(first_of(n - j))), top);
    return largest(top);
}

// Turns the scores of N queries from `query` on into 2^(scale (score - largest)), tile by tile, and into 0 for keys that
// are not visible. `take(r, place, exponential, kept)` gets each register with its dropout decisions, or with null if
// nothing is dropped. `total` receives the sum of each row.
template <int N, class Take>
LARES_INLINE void for_exponentials(const Attention& a, const AttendedSequence& s, std::int64_t h, std::int64_t query, std::int64_t tiles,
                                   const float* scores, std::int64_t stride, float scale, float (&total)[N], const Take& take) {
    Vec most[N], sums[N];
    const Vec factor = broadcast(scale);
    for (int r = 0; r < N; ++r) {
        most[r] = broadcast(largest_of(scores + r * stride, query + r + 1));
        sums[r] = broadcast(0.0f);
    }
    for (std::int64_t t = 0; t < tiles; ++t) {
        Keep kept[QUAD][DRAWS];
        if (a.dropout.threshold) {
            draw_attention(a.dropout, s.row, static_cast<std::uint32_t>(h), static_cast<std::uint32_t>(query / QUAD),
                           static_cast<std::uint32_t>(t), kept);
        }
        for (int v = 0; v < V; ++v) {
            const std::int64_t key = t * COLUMNS + v * W;
            Vec e[N];
            for (int r = 0; r < N; ++r) e[r] = mul(sub(load(scores + r * stride + key), most[r]), factor);
            exp2(e);
            for (int r = 0; r < N; ++r) {
                e[r] = select(first_lanes(query + r + 1 - key), e[r]);
                sums[r] = add(sums[r], e[r]);
                take(r, r * stride + key, e[r], a.dropout.threshold ? kept[query % QUAD + r] + v * W : nullptr);
            }
        }
    }
    for (int r = 0; r < N; ++r) total[r] = sum(sums[r]);
}

template <int N>
LARES_INLINE void attend_quad(const Attention& a, const AttendedSequence& s, std::int64_t h, const HeadScratch& w, std::int64_t query,
                              std::int64_t row) {
    const std::int64_t panel = h * a.head_panels, tiles = (query + N - 1) / COLUMNS + 1;
    float* const p = w.rows[0];
    times_tiles<N>(a.query, panel, row, w.keys, a.head_panels, query + N, p, w.stride);
    float total[N];
    for_exponentials<N>(a, s, h, query, tiles, p, w.stride, LOG2_E * a.scale, total, [&](int, std::int64_t place, Vec e, const Keep* kept) {
        store(p + place, kept ? select(kept, e) : e);
    });
    for (int r = 0; r < N; ++r) total[r] = a.dropout.scale / total[r];
    times_rows<N>(p, w.stride, a.key_value, a.panels + panel, s.first, query + N, a.head_panels, total, a.context, panel, row);
}

template <int N>
LARES_INLINE void attend_quad_backward(const Attention& a, const AttendedSequence& s, std::int64_t h, const HeadScratch& w, std::int64_t query,
                                       std::int64_t row) {
    const std::int64_t panel = h * a.head_panels, tiles = (query + N - 1) / COLUMNS + 1, keys = query + N;
    float *const p = w.rows[0], *const dropped = w.rows[1], *const grad = w.rows[2];
    times_tiles<N>(a.query, panel, row, w.keys, a.head_panels, query + N, p, w.stride);
    times_tiles<N>(a.context_grad, panel, row, w.values, a.head_panels, query + N, grad, w.stride);
    Vec along[N];
    for (int r = 0; r < N; ++r) along[r] = broadcast(0.0f);
    float total[N];
    const Vec scale = broadcast(a.dropout.scale);
    // The exponentials are not yet probabilities, because their sums are not known.
    for_exponentials<N>(a, s, h, query, tiles, p, w.stride, LOG2_E * a.scale, total, [&](int r, std::int64_t place, Vec e, const Keep* kept) {
        // A gradient beyond the visible keys belongs to another sequence or to no token.
        Vec g = select(first_lanes(query + r + 1 - (place - r * w.stride)), load(grad + place)), d = e;
        if (kept) g = mul(select(kept, g), scale), d = mul(select(kept, e), scale);
        store(p + place, e);
        store(dropped + place, d);
        store(grad + place, g);
        along[r] = fma(e, g, along[r]);
    });
    for (int r = 0; r < N; ++r) {
        const float inverse = 1.0f / total[r];
        const Vec mean = broadcast(sum(along[r]) * inverse), factor = broadcast(inverse * a.scale), probability = broadcast(inverse);
        const std::int64_t begin = r * w.stride, end = begin + tiles * COLUMNS;
        // The rounding error of the mean matters if the gradients are nearly equal or if one key has nearly all the
        // probability.
        Vec left = broadcast(0.0f);
        for (std::int64_t j = begin; j < end; j += W) left = fma(load(p + j), sub(load(grad + j), mean), left);
        const Vec rest = broadcast(sum(left) * inverse);
        for (std::int64_t j = begin; j < end; j += W) {
            store(dropped + j, mul(load(dropped + j), probability));
            store(grad + j, mul(mul(load(p + j), factor), sub(sub(load(grad + j), mean), rest)));
        }
    }
    float one[N];
    for (int r = 0; r < N; ++r) one[r] = 1.0f;
    times_rows<N>(dropped, w.stride, a.key_value, a.panels + panel, s.first, keys, a.head_panels, one, a.context, panel, row);
    times_rows<N>(grad, w.stride, a.key_value, panel, s.first, keys, a.head_panels, one, a.query_grad, panel, row);
    add_outer<N>(grad, w.stride, a.query, panel, row, keys, a.head_panels, a.key_value_grad, panel, s.first);
    add_outer<N>(dropped, w.stride, a.context_grad, panel, row, keys, a.head_panels, a.key_value_grad, a.panels + panel, s.first);
}

// Calls quad(Constant<N>, query, row) for the queries of a sequence. They are divided where a position is a multiple of
// four.
template <class Quad>
LARES_INLINE void for_quads(const AttendedSequence& s, const Quad& quad) {
    for (std::int64_t query = s.query; query < s.length;) {
        const std::int64_t end = query / QUAD * QUAD + QUAD < s.length ? query / QUAD * QUAD + QUAD : s.length;
        const std::int64_t row = s.query_row + query - s.query;
        if (end - query == 4) quad(Constant<4>{}, query, row);
        if (end - query == 3) quad(Constant<3>{}, query, row);
        if (end - query == 2) quad(Constant<2>{}, query, row);
        if (end - query == 1) quad(Constant<1>{}, query, row);
        query = end;
    }
}

inline HeadScratch head_scratch(const Attention& a, std::int64_t length) {
    const std::int64_t keys = round_up(length, COLUMNS), tiles = keys * a.head_panels * COLUMNS;
    float* const rows = a.scratch + 2 * tiles;
    return {a.scratch, a.scratch + tiles, {rows, rows + QUAD * keys, rows + 2 * QUAD * keys}, keys};
}

inline void attend(const Attention& a, const AttendedSequence& s) {
    const HeadScratch w = head_scratch(a, s.length);
    for (std::int64_t h = 0; h < a.panels / a.head_panels; ++h) {
        transpose_head(a.key_value, h * a.head_panels, a.head_panels, s.first, s.length, w.keys);
        for_quads(s, [&](auto size, std::int64_t query, std::int64_t row) __attribute__((always_inline)) {
            attend_quad<decltype(size)::value>(a, s, h, w, query, row);
        });
    }
}

// Computes the context again, and the gradients of queries, keys and values. The gradients of keys and values are added.
inline void attend_backward(const Attention& a, const AttendedSequence& s) {
    const HeadScratch w = head_scratch(a, s.length);
    for (std::int64_t h = 0; h < a.panels / a.head_panels; ++h) {
        transpose_head(a.key_value, h * a.head_panels, a.head_panels, s.first, s.length, w.keys);
        transpose_head(a.key_value, a.panels + h * a.head_panels, a.head_panels, s.first, s.length, w.values);
        for_quads(s, [&](auto size, std::int64_t query, std::int64_t row) __attribute__((always_inline)) {
            attend_quad_backward<decltype(size)::value>(a, s, h, w, query, row);
        });
    }
}

}  // namespace
}  // namespace lares_fast
