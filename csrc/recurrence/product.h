// Matrix products on panels, tile by tile in registers.
#pragma once

#include <cstring>

#include "base/constant.h"
#include "recurrence/bf16.h"
#include "recurrence/layout.h"
#include "simd/vec.h"
#if defined(LARES_TILES)
#include "simd/tiles.h"
#endif

namespace lares_fast {
namespace {

constexpr int V = static_cast<int>(COLUMNS) / W;  // registers of a row of a panel

#if defined(LARES_TILES)
constexpr int R = TILE_ROWS, PRODUCT_PANELS = 4;
constexpr int SUM_ROWS = 6, SUM_PANELS = 4;
#elif defined(__AVX512F__)
constexpr int R = 6, PRODUCT_PANELS = 4;  // a tile has R rows of PRODUCT_PANELS panels or of one panel
constexpr int SUM_ROWS = 6, SUM_PANELS = 4;
#elif defined(__AVX2__)
constexpr int R = 6, PRODUCT_PANELS = 1;
constexpr int SUM_ROWS = 6, SUM_PANELS = 1;
#else
constexpr int R = 3, PRODUCT_PANELS = 1;
constexpr int SUM_ROWS = 2, SUM_PANELS = 1;
#endif

#if defined(LARES_BF16)
constexpr bool ROUNDED = true;
#else
constexpr bool ROUNDED = false;
#endif
#if defined(LARES_BF16) && (defined(__AVX512BF16__) || defined(LARES_TILES))
constexpr bool PAIRS = true;  // pairs of rows of the matrices are stored together
#else
constexpr bool PAIRS = false;
#endif

struct Matrix {
    float* data;
    std::int64_t rows;  // rows from panel to panel

    LARES_INLINE float* at(std::int64_t panel, std::int64_t row) const { return data + (panel * rows + row) * COLUMNS; }
};

// Adds R rows of x [., 16] times N matrices [16][16], which are `apart` floats apart.
template <int N>
LARES_INLINE void multiply_panel(const float* x, const float* b, std::int64_t apart, Vec (&sums)[R][N * V]) {
    const float* from[N];
    for (int n = 0; n < N; ++n) {
        from[n] = b + n * apart;
        // This keeps one address for each matrix. Otherwise the compiler derives each address from the others and reloads
        // the distances.
        asm("" : "+r"(from[n]));
    }
#pragma GCC unroll 16
    for (int k = 0; k < COLUMNS; ++k) {
        Vec column[N * V];
        for (int n = 0; n < N; ++n) {
            for (int v = 0; v < V; ++v) column[n * V + v] = load(from[n] + k * COLUMNS + v * W);
        }
        for (int r = 0; r < R; ++r) {
            const Vec factor = broadcast(x[r * COLUMNS + k]);
            for (int v = 0; v < N * V; ++v) sums[r][v] = fma(factor, column[v], sums[r][v]);
        }
    }
}

// Like multiply_panel, but with x rounded to bf16. The constant PAIRS above says how the matrices are stored.
template <int N>
LARES_INLINE void multiply_panel_bf16(const float* x, const float* b, std::int64_t apart, Vec (&sums)[R][N * V]) {
#if defined(__AVX512BF16__)
    constexpr int PAIRS = static_cast<int>(COLUMNS) / 2;
    std::int32_t pairs[R][PAIRS];
    for (int r = 0; r < R; ++r) {
        const __m256bh rounded = _mm512_cvtneps_pbh(load(x + r * COLUMNS));
        std::memcpy(pairs[r], &rounded, sizeof rounded);
    }
#pragma GCC unroll 8
    for (int k = 0; k < PAIRS; ++k) {
        __m512bh column[N];
        for (int n = 0; n < N; ++n) std::memcpy(&column[n], b + n * apart + k * COLUMNS, sizeof column[n]);
        for (int r = 0; r < R; ++r) {
            const auto factors = (__m512bh)_mm512_set1_epi32(pairs[r][k]);
            for (int n = 0; n < N; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], factors, column[n]);
        }
    }
#else
    float rounded[R * COLUMNS];
    for (int i = 0; i < R * COLUMNS; ++i) rounded[i] = from_bf16(to_bf16(x[i]));
    multiply_panel<N>(rounded, b, apart, sums);
#endif
}

constexpr std::int64_t PANEL_FLOATS = PAIRS ? COLUMNS * COLUMNS / 2 : COLUMNS * COLUMNS;  // floats of sixteen rows

// Returns the floats of the matrix that `panels` panels of x are multiplied with.
LARES_INLINE std::int64_t matrix_floats(std::int64_t panels) { return (PAIRS ? round_up(panels, 2) : panels) * PANEL_FLOATS; }

#if defined(LARES_TILES)

// Rounds 32 numbers of a row, from two panels, to bf16.
LARES_INLINE void round_row(Vec low, Vec high, std::uint16_t (&to)[2 * COLUMNS]) {
#if defined(__AVX512BF16__)
    const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
    std::memcpy(to, &rounded, sizeof rounded);
#else
    float exact[2 * COLUMNS];
    store(exact, low), store(exact + COLUMNS, high);
    for (int i = 0; i < 2 * COLUMNS; ++i) to[i] = to_bf16(exact[i]);
#endif
}

// Adds 16 rows of x [., depth] times N panels, in tile registers. The sums are in tiles 0 to N - 1.
template <int N>
LARES_INLINE void multiply(const float* x, std::int64_t x_rows, std::int64_t panels, const float* b, Vec (&sums)[R][N * V]) {
    static_assert(N == 1 || N == 4, "tiles are named one by one");
    alignas(TILE_BYTES) std::uint16_t rows[2][R][2 * COLUMNS];
    const std::int64_t apart = matrix_floats(panels);
    load_tile<0>(&sums[0][0], sizeof sums[0]);
    if constexpr (N == 4) {
        load_tile<1>(&sums[0][1], sizeof sums[0]);
        load_tile<2>(&sums[0][2], sizeof sums[0]);
        load_tile<3>(&sums[0][3], sizeof sums[0]);
    }
    for (std::int64_t p = 0; p < panels; p += 2, x += 2 * x_rows * COLUMNS, b += 2 * PANEL_FLOATS) {
        auto& rounded = rows[p / 2 % 2];
        for (int r = 0; r < R; ++r) {
            const float* const row = x + r * COLUMNS;
            round_row(load(row), p + 1 < panels ? load(row + x_rows * COLUMNS) : broadcast(0.0f), rounded[r]);
        }
        load_tile<4>(rounded, TILE_BYTES);
        load_tile<5>(b, TILE_BYTES);
        multiply_tiles<0, 4, 5>();
        if constexpr (N == 4) {
            load_tile<6>(b + apart, TILE_BYTES);
            multiply_tiles<1, 4, 6>();
            load_tile<7>(b + 2 * apart, TILE_BYTES);
            multiply_tiles<2, 4, 7>();
            load_tile<5>(b + 3 * apart, TILE_BYTES);
            multiply_tiles<3, 4, 5>();
        }
    }
    store_tile<0>(&sums[0][0], sizeof sums[0]);
    if constexpr (N == 4) {
        store_tile<1>(&sums[0][1], sizeof sums[0]);
        store_tile<2>(&sums[0][2], sizeof sums[0]);
        store_tile<3>(&sums[0][3], sizeof sums[0]);
    }
}

#else

// Adds R rows of x [., depth] times N panels [depth][16], which are `depth` rows apart. Each panel of x but the first one
// has sums of its own, which are added at its end: a chain of sixteen products is more accurate than a chain over the whole
// depth.
template <int N>
LARES_INLINE void multiply(const float* x, std::int64_t x_rows, std::int64_t panels, const float* b, Vec (&sums)[R][N * V]) {
    const std::int64_t apart = matrix_floats(panels);
    const auto panel = [&](std::int64_t p, Vec(&to)[R][N * V]) __attribute__((always_inline)) {
        if constexpr (ROUNDED) {
            multiply_panel_bf16<N>(x + p * x_rows * COLUMNS, b + p * PANEL_FLOATS, apart, to);
        } else {
            multiply_panel<N>(x + p * x_rows * COLUMNS, b + p * PANEL_FLOATS, apart, to);
        }
    };
    panel(0, sums);
    for (std::int64_t p = 1; p < panels; ++p) {
        Vec part[R][N * V];
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < N * V; ++v) part[r][v] = broadcast(0.0f);
        }
        panel(p, part);
        for (int r = 0; r < R; ++r) {
            for (int v = 0; v < N * V; ++v) sums[r][v] = add(sums[r][v], part[r][v]);
        }
    }
}

#endif

// A call of `after` starts with a wait for its first results, so it takes the rows of several tiles together.
constexpr std::int64_t AFTER_ROWS = 4 * ROW_TILE;

template <int N, class Finish, class After>
LARES_INLINE void product_panels(Matrix x, std::int64_t x_panels, const float* b, const float* bias, std::int64_t panel, std::int64_t from,
                                 std::int64_t to, const Finish& finish, const After& after) {
    std::int64_t done = from;
    for (std::int64_t row = from; row < to; row += R) {
        // Buffers end with a whole tile of ROW_TILE rows.
        const std::int64_t rows = R > ROW_TILE && to - row < R ? to - row : R;
        Vec sums[R][N * V];
        for (int v = 0; v < N * V; ++v) {
            const Vec start = bias ? load(bias + panel * COLUMNS + v * W) : broadcast(0.0f);
            for (int r = 0; r < R; ++r) sums[r][v] = start;
        }
        multiply<N>(x.at(0, row), x.rows, x_panels, b + panel * matrix_floats(x_panels), sums);
        for (int n = 0; n < N; ++n) {
            for (int r = 0; r < rows; ++r) {
                for (int v = 0; v < V; ++v) finish(panel + n, row + r, v, sums[r][n * V + v]);
            }
        }
        const std::int64_t end = row + rows;
        if (end - done < AFTER_ROWS && end < to) continue;
        for (int n = 0; n < N; ++n) after(panel + n, done, end - done);
        done = end;
    }
}

struct Nothing {
    LARES_INLINE void operator()(std::int64_t, std::int64_t, std::int64_t) const {}
};

// Multiplies the rows [from, to) of x with B [16 * x_panels, 16 * panels] and adds the bias. `finish(panel, row, v, sums)`
// receives the results, and `after(panel, row, rows)` follows after a few tiles. Whole tiles are computed, so rows behind
// `to` are computed too.
template <class Finish, class After = Nothing>
LARES_INLINE void product(Matrix x, std::int64_t x_panels, const float* b, const float* bias, std::int64_t panels, std::int64_t from,
                          std::int64_t to, const Finish& finish, const After& after = {}) {
    std::int64_t panel = 0;
    for (; PRODUCT_PANELS > 1 && panel + PRODUCT_PANELS <= panels; panel += PRODUCT_PANELS) {
        product_panels<PRODUCT_PANELS>(x, x_panels, b, bias, panel, from, to, finish, after);
    }
    for (; panel < panels; ++panel) product_panels<1>(x, x_panels, b, bias, panel, from, to, finish, after);
}

// Adds y^T x over `rows` rows to sums [out][in], for TILE columns of y and N panels of x.
template <int TILE, int N>
LARES_INLINE void accumulate_tile(const float* y, const float* x, std::int64_t x_apart, std::int64_t rows, float* to, std::int64_t stride) {
    Vec sums[TILE][N * V];
    for (int o = 0; o < TILE; ++o) {
        for (int v = 0; v < N * V; ++v) sums[o][v] = broadcast(0.0f);
    }
#pragma GCC unroll 4
    for (std::int64_t m = 0; m < rows; ++m) {
        Vec row[N * V];
        for (int n = 0; n < N; ++n) {
            for (int v = 0; v < V; ++v) row[n * V + v] = load(x + n * x_apart + m * COLUMNS + v * W);
        }
        for (int o = 0; o < TILE; ++o) {
            const Vec factor = broadcast(y[m * COLUMNS + o]);
            for (int v = 0; v < N * V; ++v) sums[o][v] = fma(factor, row[v], sums[o][v]);
        }
    }
    // The sum of these rows is added to the sum of all rows. That is more accurate than one long chain.
    for (int o = 0; o < TILE; ++o) {
        for (int v = 0; v < N * V; ++v) {
            float* const place = to + o * stride + v * W;
            store(place, add(load(place), sums[o][v]));
        }
    }
}

template <int N>
LARES_INLINE void accumulate_panels(Matrix y, std::int64_t y_panel, Matrix x, std::int64_t x_panel, std::int64_t rows, float* to,
                                    std::int64_t stride) {
    int o = 0;
    const auto tile = [&](auto size) __attribute__((always_inline)) {
        accumulate_tile<decltype(size)::value, N>(y.at(y_panel, 0) + o, x.at(x_panel, 0), x.rows * COLUMNS, rows, to + o * stride, stride);
        o += decltype(size)::value;
    };
    constexpr int LAST = static_cast<int>(COLUMNS) % SUM_ROWS;
    while (o + SUM_ROWS <= COLUMNS) tile(Constant<SUM_ROWS>{});
    if constexpr (LAST > 0) tile(Constant<LAST>{});
}

// Adds y^T x over the first `rows` rows to sums [16 * y_panels, 16 * x_panels].
LARES_INLINE void accumulate(Matrix y, std::int64_t y_panels, Matrix x, std::int64_t x_panels, std::int64_t rows, float* sums) {
    const std::int64_t stride = x_panels * COLUMNS;
    for (std::int64_t y_panel = 0; y_panel < y_panels; ++y_panel) {
        float* const to = sums + y_panel * COLUMNS * stride;
        std::int64_t x_panel = 0;
        for (; SUM_PANELS > 1 && x_panel + SUM_PANELS <= x_panels; x_panel += SUM_PANELS) {
            accumulate_panels<SUM_PANELS>(y, y_panel, x, x_panel, rows, to + x_panel * COLUMNS, stride);
        }
        for (; x_panel < x_panels; ++x_panel) accumulate_panels<1>(y, y_panel, x, x_panel, rows, to + x_panel * COLUMNS, stride);
    }
}

// Adds the sum of the first `rows` rows of y to sums [16 * panels].
inline void accumulate_rows(Matrix y, std::int64_t panels, std::int64_t rows, float* sums) {
    for (std::int64_t p = 0; p < panels; ++p) {
        // Even and odd rows are summed separately, because an addition waits for the one before it.
        Vec sum[2][V];
        for (int v = 0; v < V; ++v) sum[0][v] = sum[1][v] = broadcast(0.0f);
        for (std::int64_t m = 0; m < rows; m += 2) {
            for (int v = 0; v < V; ++v) {
                sum[0][v] = add(sum[0][v], load(y.at(p, m) + v * W));
                if (m + 1 < rows) sum[1][v] = add(sum[1][v], load(y.at(p, m + 1) + v * W));
            }
        }
        for (int v = 0; v < V; ++v) {
            float* const to = sums + p * COLUMNS + v * W;
            store(to, add(load(to), add(sum[0][v], sum[1][v])));
        }
    }
}

}  // namespace
}  // namespace lares_fast
