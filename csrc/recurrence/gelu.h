// The exact GELU and its derivative, by the tail of the normal law: docs/kernels/recurrence.md.
#pragma once

#include "simd/exp2.h"

namespace lares_fast {
namespace {

// |x|, up to where nothing of the tail is left.
LARES_INLINE Vec distance(Vec x) { return min(broadcast(8.0f), abs(x)); }

// 2 Phi(-a) = 2^(a P(a)), the tail within 1e-8: near 0 the exponent is small, and far out what it is the exponent of.
LARES_INLINE Vec two_tails(Vec a) {
    Vec p = broadcast(-2.84171074e-6f);
    p = fma(p, a, broadcast(3.94601884e-5f));
    p = fma(p, a, broadcast(-1.86578094e-4f));
    p = fma(p, a, broadcast(-1.35957991e-4f));
    p = fma(p, a, broadcast(7.06211245e-3f));
    p = fma(p, a, broadcast(-5.24952449e-2f));
    p = fma(p, a, broadcast(-0.459208518f));
    p = fma(p, a, broadcast(-1.15110517f));
    return exp2(mul(a, p));
}

// 1 - a phi(a) / Phi(-a): what a tail is multiplied by in the derivative, times the tail within 1e-8.
LARES_INLINE Vec bend(Vec a) {
    Vec p = broadcast(2.5591894e-6f);
    p = fma(p, a, broadcast(-4.47390812e-5f));
    p = fma(p, a, broadcast(3.20619118e-4f));
    p = fma(p, a, broadcast(-1.06530311e-3f));
    p = fma(p, a, broadcast(-1.26827319e-4f));
    p = fma(p, a, broadcast(1.93704832e-2f));
    p = fma(p, a, broadcast(-0.109105125f));
    p = fma(p, a, broadcast(-0.63660121f));
    p = fma(p, a, broadcast(-0.797885716f));
    return fma(p, a, broadcast(1.0f));
}

// x Phi(x) = max(x, 0) - |x| Phi(-|x|)
LARES_INLINE Vec gelu(Vec x, Vec a, Vec tails) { return fma(mul(a, broadcast(-0.5f)), tails, max(broadcast(0.0f), x)); }

// In place for n floats, a multiple of two registers. Functions of their own, because their constants and a product's sums
// do not fit in the registers together.
__attribute__((noinline)) void gelu_all(float* x, std::int64_t n) {
#pragma GCC unroll 2
    for (std::int64_t i = 0; i < n; i += W) {
        const Vec v = load(x + i), a = distance(v);
        store(x + i, gelu(v, a, two_tails(a)));
    }
}

__attribute__((noinline)) void gelu_and_slope_all(float* x, std::int64_t n, float* slopes) {
#pragma GCC unroll 2
    for (std::int64_t i = 0; i < n; i += W) {
        const Vec v = load(x + i), a = distance(v), tails = two_tails(a);
        store(x + i, gelu(v, a, tails));
        const Vec above = fma(mul(tails, broadcast(-0.5f)), bend(a), broadcast(0.5f));
        store(slopes + i, add(broadcast(0.5f), with_sign(above, v)));
    }
}

}  // namespace
}  // namespace lares_fast
