// The exact GELU and its derivative.
#pragma once

#include "simd/exp2.h"

namespace lares_fast {
namespace {

// erf(x / sqrt 2) within 1e-7: x P(x^2) / Q(x^2), a minimax fit up to |x| = 5.4, from where on it rounds to 1.
LARES_INLINE Vec erf_of_normal(Vec x) {
    x = min(max(x, broadcast(-5.4f)), broadcast(5.4f));
    const Vec s = mul(x, x);
    Vec p = broadcast(4.71814836551e-8f), q = broadcast(1.21978043081e-6f);
    p = fma(p, s, broadcast(1.2646458429e-5f));
    q = fma(q, s, broadcast(7.11629788341e-5f));
    p = fma(p, s, broadcast(3.21338231767e-4f));
    q = fma(q, s, broadcast(1.83850924961e-3f));
    p = fma(p, s, broadcast(9.25760356444e-3f));
    q = fma(q, s, broadcast(2.81787652647e-2f));
    p = fma(p, s, broadcast(6.60543304422e-2f));
    q = fma(q, s, broadcast(2.49453291538e-1f));
    p = fma(p, s, broadcast(7.9788455088e-1f));
    q = fma(q, s, broadcast(1.0f));
    return div(mul(x, p), q);
}

LARES_INLINE Vec gelu(Vec x) {
    const Vec half = mul(x, broadcast(0.5f));
    return fma(half, erf_of_normal(x), half);
}

// gelu(x), and gelu'(x) = Phi(x) + x phi(x) in `slope`.
LARES_INLINE Vec gelu_and_slope(Vec x, Vec& slope) {
    const Vec phi = fma(broadcast(0.5f), erf_of_normal(x), broadcast(0.5f));
    // phi(x) = 2^(-x^2 / (2 ln 2)) / sqrt(2 pi)
    const Vec density = mul(exp2(mul(mul(x, x), broadcast(-0.72134752f))), broadcast(0.39894228f));
    slope = fma(x, density, phi);
    return mul(x, phi);
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
