// The exact GELU and its derivative.
#pragma once

#include "simd/exp2.h"

namespace lares_fast {
namespace {

// |x|, up to where both tails round to nothing.
LARES_INLINE Vec size_of(Vec x) { return min(max(x, sub(broadcast(0.0f), x)), broadcast(14.0f)); }

// Phi(-t), t from size_of, and phi(t) in `density`: phi(t) times Mills' ratio, a minimax polynomial in u = 1 / (1 + 0.34 t) within
// 3e-8. A tail has digits that erf, which is near 1, has lost.
LARES_INLINE Vec tail_of_normal(Vec t, Vec& density) {
    // phi(t) = 2^(-t^2 / (2 ln 2)) / sqrt(2 pi)
    density = mul(exp2(mul(mul(t, t), broadcast(-0.72134752f))), broadcast(0.39894228f));
    const Vec u = div(broadcast(1.0f), fma(t, broadcast(0.34f), broadcast(1.0f)));
    Vec ratio = broadcast(-0.0654748962f);
    ratio = fma(ratio, u, broadcast(0.349675885f));
    ratio = fma(ratio, u, broadcast(-0.684646889f));
    ratio = fma(ratio, u, broadcast(0.506801462f));
    ratio = fma(ratio, u, broadcast(-0.112095327f));
    ratio = fma(ratio, u, broadcast(0.289163555f));
    ratio = fma(ratio, u, broadcast(0.288757491f));
    ratio = fma(ratio, u, broadcast(0.341182707f));
    ratio = fma(ratio, u, broadcast(0.339950187f));
    return mul(density, mul(ratio, u));
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|)
LARES_INLINE Vec gelu_of(Vec x, Vec t, Vec tail) { return fma(sub(broadcast(0.0f), t), tail, max(x, broadcast(0.0f))); }

LARES_INLINE Vec gelu(Vec x) {
    Vec density;
    const Vec t = size_of(x);
    return gelu_of(x, t, tail_of_normal(t, density));
}

// gelu(x), and gelu'(x) = Phi(x) + x phi(x) in `slope`.
LARES_INLINE Vec gelu_and_slope(Vec x, Vec& slope) {
    Vec density;
    const Vec t = size_of(x), tail = tail_of_normal(t, density);
    const Vec sign = min(max(mul(x, broadcast(1e30f)), broadcast(-1.0f)), broadcast(1.0f));
    // Phi(x) - 1/2 and x phi(x) have the sign of x.
    slope = fma(fma(t, density, sub(broadcast(0.5f), tail)), sign, broadcast(0.5f));
    return gelu_of(x, t, tail);
}

// In place for n floats, a multiple of two registers. Functions of their own, because their constants and a product's sums
// do not fit in the registers together.
__attribute__((noinline)) void gelu_all(float* x, std::int64_t n) {
#pragma GCC unroll 2
    for (std::int64_t i = 0; i < n; i += W) store(x + i, gelu(load(x + i)));
}

__attribute__((noinline)) void gelu_and_slope_all(float* x, std::int64_t n, float* slopes) {
#pragma GCC unroll 2
    for (std::int64_t i = 0; i < n; i += W) {
        Vec slope;
        store(x + i, gelu_and_slope(load(x + i), slope));
        store(slopes + i, slope);
    }
}

}  // namespace
}  // namespace lares_fast
