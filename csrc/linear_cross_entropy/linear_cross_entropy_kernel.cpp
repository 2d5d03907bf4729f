#include "linear_cross_entropy/linear_cross_entropy_kernel.h"

#include "catalog/scores.h"
#include "simd/exp2.h"
#include "target_rank/rank_counter.h"

namespace lares_fast {
namespace {

static_assert(W <= MAX_LANES, "lanes of a row");

constexpr float HEADROOM = 24.0f;          // a sum of terms up to 2^24 is as accurate as a sum of terms up to 1
constexpr std::int64_t SUM_ITEMS = 64 * PANEL;  // items whose terms are summed in fp32

// The terms of this many queries are computed together, step by step.
constexpr int GROUP = 4;

// Returns `exists` without the lane of the target, if the target is among these items.
LARES_INLINE Mask others(std::int64_t target, std::int64_t first, int v, Mask exists) {
    const auto lane = static_cast<std::uint64_t>(target - first - v * W);
    return lane < W ? exists & ~(1u << lane) : exists;
}

template <int R>
LARES_INLINE bool holds_target(const std::int64_t* target, std::int64_t first) {
    bool found = false;
    for (int r = 0; r < R; ++r) found |= static_cast<std::uint64_t>(target[r] - first) < PANEL;
    return found;
}

// Makes the highest of `scores` [PANEL] the reference of query b if it is above the limit. A NaN score makes the reference
// NaN.
__attribute__((noinline)) void raise(const SumScan& s, std::int64_t b, const float* scores, const Mask (&exists)[VECS]) {
    float top = s.reference[b];
    for (int i = 0; i < PANEL; ++i) {
        if (exists[i / W] >> i % W & 1 && !(scores[i] <= top) && top == top) top = scores[i];
    }
    if (top <= s.limit[b]) return;
    float* lanes = s.lanes + b * MAX_LANES;
    Vec factor[1] = {broadcast(s.reference[b] - top)};
    exp2_of_product(factor, broadcast(s.base), broadcast(s.base_rest));
    float factors[W];
    store(factors, factor[0]);
    store(lanes, mul(load(lanes), factor[0]));
    s.sum[b] *= static_cast<double>(factors[0]);
    s.reference[b] = top;
    s.limit[b] = top + HEADROOM / s.base;
}

struct Terms {
    const SumScan& s;

    void panel(std::int64_t, std::int64_t) const {}

    template <int R>
    LARES_INLINE void take(std::int64_t b, const Vec (&sums)[R][VECS], std::int64_t first, const Mask (&exists)[VECS]) const {
        const float* limit = s.limit + b;
        Excess above = excess(sums[0][0], broadcast(limit[0]));
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < VECS; ++v) above = either(above, excess(sums[r][v], broadcast(limit[r])));
        }
        if (__builtin_expect(any(above), 0)) {
            float scores[R][PANEL];
            for (int r = 0; r < R; ++r) {
                for (int v = 0; v < VECS; ++v) store(scores[r] + v * W, sums[r][v]);
            }
            for (int r = 0; r < R; ++r) raise(s, b + r, scores[r], exists);
        }
        if (__builtin_expect(exists[VECS - 1] == ALL && !holds_target<R>(s.target + b, first), 1)) {
            add_terms<R>(b, sums, [](int, int, Vec term) __attribute__((always_inline)) { return term; });
        } else {
            add_terms<R>(b, sums, [&](int r, int v, Vec term) __attribute__((always_inline)) {
                return select(others(s.target[b + r], first, v, exists[v]), term);
            });
        }
    }

    template <int R, class Keep>
    LARES_INLINE void add_terms(std::int64_t b, const Vec (&sums)[R][VECS], const Keep& keep) const {
        const Vec base = broadcast(s.base), base_rest = broadcast(s.base_rest);
        const float* reference = s.reference + b;
        float* lanes = s.lanes + b * MAX_LANES;
        constexpr int G = R < GROUP ? R : GROUP;
        for (int r = 0; r < R; r += G) {
            Vec term[G * VECS];
            for (int i = 0; i < G; ++i) {
                const Vec own = broadcast(reference[r + i]);
                for (int v = 0; v < VECS; ++v) term[i * VECS + v] = sub(sums[r + i][v], own);
            }
            exp2_of_product(term, base, base_rest);
            for (int i = 0; i < G; ++i) {
                Vec total = load(lanes + (r + i) * MAX_LANES);
                for (int v = 0; v < VECS; ++v) total = add(total, keep(r + i, v, term[i * VECS + v]));
                store(lanes + (r + i) * MAX_LANES, total);
            }
        }
    }
};

struct TermsAndRank {
    Terms terms;
    RankCounter count;

    void panel(std::int64_t item, std::int64_t items) { count.panel(item, items); }

    template <int R>
    LARES_INLINE void take(std::int64_t b, const Vec (&sums)[R][VECS], std::int64_t first, const Mask (&exists)[VECS]) {
        terms.take<R>(b, sums, first, exists);
        count.take<R>(b, sums, first, exists);
    }
};

void sums(const SumScan& s, std::int64_t first, std::int64_t last) {
    for (std::int64_t b = 0; b < s.B; ++b) s.limit[b] = s.reference[b] + HEADROOM / s.base;
    for (std::int64_t next; first < last; first = next) {
        next = last - first < SUM_ITEMS ? last : first + SUM_ITEMS;
        if (s.rank) {
            for_each_panel(s.catalog, s.query, s.B, first, next, s.scratch, TermsAndRank{Terms{s}, start_counting(*s.rank, first, next)});
        } else {
            for_each_panel(s.catalog, s.query, s.B, first, next, s.scratch, Terms{s});
        }
        for (std::int64_t b = 0; b < s.B; ++b) {
            float* lanes = s.lanes + b * MAX_LANES;
            double total = 0.0;
            for (int lane = 0; lane < W; ++lane) total += static_cast<double>(lanes[lane]), lanes[lane] = 0.0f;
            s.sum[b] += total;
        }
    }
}

// Products of small matrices. R rows by 2 registers of columns stay in registers over the whole sum. Matrices of width D
// are kept in panels of BLOCK_COLUMNS columns, [panel][row][BLOCK_COLUMNS], so that neighbouring rows are in neighbouring
// cache lines.
constexpr int PRODUCT_ROWS = W == 16 ? 12 : 6;
constexpr int BLOCK_COLUMNS = 2 * W;
constexpr int TILE = 96;
// The terms of this many queries with one tile stay in the L2 cache.
constexpr std::int64_t BLOCK_ROWS = 192;

static_assert(TILE % PANEL == 0 && BLOCK_ROWS % ROWS == 0 && BLOCK_ROWS % PRODUCT_ROWS == 0, "whole tiles");

// out[r] += sum_k a[r * A_ROW + k * A_K] b[k] for R rows of BLOCK_COLUMNS columns.
template <int R, int A_ROW, int A_K>
LARES_INLINE void product_tile(const float* a, const float* b, std::int64_t K, float* out) {
    Vec sum[R][2];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = broadcast(0.0f);
#pragma GCC unroll 4
    for (std::int64_t k = 0; k < K; ++k) {
        const Vec left = load(b + k * BLOCK_COLUMNS), right = load(b + k * BLOCK_COLUMNS + W);
        for (int r = 0; r < R; ++r) {
            const Vec x = broadcast(a[r * A_ROW + k * A_K]);
            sum[r][0] = fma(x, left, sum[r][0]);
            sum[r][1] = fma(x, right, sum[r][1]);
        }
    }
    for (int r = 0; r < R; ++r) {
        float* row = out + r * BLOCK_COLUMNS;
        store(row, add(load(row), sum[r][0]));
        store(row + W, add(load(row + W), sum[r][1]));
    }
}

template <int R, int A_ROW, int A_K>
LARES_INLINE void product(const float* a, const float* b, std::int64_t rows, std::int64_t K, float* out) {
    for (; rows >= R; rows -= R, a += R * A_ROW, out += R * BLOCK_COLUMNS) product_tile<R, A_ROW, A_K>(a, b, K, out);
    if constexpr (R > 1) {
        if (rows) product<R / 2, A_ROW, A_K>(a, b, rows, K, out);
    }
}

// Computes terms [rows][TILE] of the queries [first_row, last_row) with the `items` items from `item` on.
void terms_of_tile(const GradientScan& s, const float* panels, std::int64_t item, std::int64_t items, std::int64_t first_row,
                   std::int64_t last_row, float* terms) {
    const Vec base = broadcast(s.base), base_rest = broadcast(s.base_rest);
    const auto tile = [&](auto rows, std::int64_t b) __attribute__((always_inline)) {
        constexpr int R = decltype(rows)::value;
        const float* panel = panels;
        for (std::int64_t i0 = 0; i0 < items; i0 += PANEL, panel += PANEL * s.D) {
            Vec scores[R][VECS];
            score_tile<R>(s.query + b * s.D, panel, nullptr, s.D, scores);
            float* out = terms + (b - first_row) * TILE + i0;
            const bool whole = !holds_target<R>(s.target + b, item + i0);
            constexpr int G = R < GROUP ? R : GROUP;
            for (int r = 0; r < R; r += G) {
                Vec term[G * VECS];
                for (int i = 0; i < G; ++i) {
                    const Vec reference = broadcast(s.reference[b + r + i]);
                    for (int v = 0; v < VECS; ++v) term[i * VECS + v] = sub(scores[r + i][v], reference);
                }
                exp2_of_product(term, base, base_rest);
                for (int i = 0; i < G; ++i) {
                    for (int v = 0; v < VECS; ++v) {
                        Vec t = term[i * VECS + v];
                        if (__builtin_expect(!whole, 0)) t = select(others(s.target[b + r + i], item + i0, v, ALL), t);
                        store(out + (r + i) * TILE + v * W, t);
                    }
                }
            }
        }
    };
    std::int64_t b = first_row;
    for (; b + ROWS <= last_row; b += ROWS) tile(Constant<ROWS>{}, b);
    if (ROWS > 4 && b + 4 <= last_row) tile(Constant<4>{}, b), b += 4;
    if (b + 2 <= last_row) tile(Constant<2>{}, b), b += 2;
    if (b < last_row) tile(Constant<1>{}, b);
}

// Copies up to BLOCK_COLUMNS floats.
LARES_INLINE void copy(const float* from, std::int64_t n, float* to) {
    if (n == BLOCK_COLUMNS) {
        store(to, load(from));
        store(to + W, load(from + W));
    } else {
        for (std::int64_t d = 0; d < n; ++d) to[d] = from[d];
    }
}

std::int64_t gradient_scratch(std::int64_t D, std::int64_t width) { return TILE * D + 2 * TILE * width + BLOCK_ROWS * TILE; }

void gradients(const GradientScan& s, std::int64_t first, std::int64_t last) {
    const std::int64_t D = s.D, width = s.width;
    float* panels = s.scratch;
    float* rows = panels + TILE * D;
    float* sum = rows + TILE * width;
    float* terms = sum + TILE * width;
    for (std::int64_t item = first; item < last; item += TILE) {
        const std::int64_t items = last - item < TILE ? last - item : TILE;
        const float* from = s.items + item * D;
        for (std::int64_t i = 0; i < items; i += PANEL) {
            pack_panel(from + i * D, items - i < PANEL ? items - i : PANEL, D, panels + i * D);
        }
        for (std::int64_t c = 0; c < D; c += BLOCK_COLUMNS) {
            const std::int64_t n = D - c < BLOCK_COLUMNS ? D - c : BLOCK_COLUMNS;
            for (std::int64_t i = 0; i < items; ++i) copy(from + i * D + c, n, rows + c * TILE + i * BLOCK_COLUMNS);
        }
        if (s.d_items) std::memset(sum, 0, sizeof(float) * static_cast<std::size_t>(TILE * width));
        for (std::int64_t b = 0; b < s.B; b += BLOCK_ROWS) {
            const std::int64_t B = s.B - b < BLOCK_ROWS ? s.B - b : BLOCK_ROWS;
            terms_of_tile(s, panels, item, items, b, b + B, terms);
            for (std::int64_t c = 0; c < width; c += BLOCK_COLUMNS) {
                if (s.d_hidden) product<PRODUCT_ROWS, TILE, 1>(terms, rows + c * TILE, B, items, s.d_hidden + c * s.B + b * BLOCK_COLUMNS);
                if (s.d_items) product<PRODUCT_ROWS, 1, TILE>(terms, s.weighted + c * s.B + b * BLOCK_COLUMNS, items, B, sum + c * TILE);
            }
        }
        for (std::int64_t c = 0; s.d_items && c < D; c += BLOCK_COLUMNS) {
            const std::int64_t n = D - c < BLOCK_COLUMNS ? D - c : BLOCK_COLUMNS;
            for (std::int64_t i = 0; i < items; ++i) {
                const float* gradient = sum + c * TILE + i * BLOCK_COLUMNS;
                float* out = s.d_items + (item + i) * D + c;
                if (s.add) {
                    for (std::int64_t d = 0; d < n; ++d) out[d] += gradient[d];
                } else {
                    copy(gradient, n, out);
                }
            }
        }
    }
}

float score(const float* query, const float* item, std::int64_t D) { return score_one(query, item, 0.0f, D); }

}  // namespace

namespace LARES_INSTRUCTION_SET {
extern const CrossEntropyKernel cross_entropy_kernel;
const CrossEntropyKernel cross_entropy_kernel{PANEL, ROWS, BLOCK_COLUMNS, TILE, sums, gradients, gradient_scratch, score};
}  // namespace LARES_INSTRUCTION_SET

}  // namespace lares_fast
