// The exact GELU and its derivative, from the tail of the normal distribution (docs/kernels/recurrence.md).
#pragma once

#include "simd/exp2.h"

namespace lares_fast {
namespace {

// 2 Phi(-a) = 2^(a P(a)) for a in [0, 8]. The tail is accurate to 1e-8: near 0 the exponent is small, and for large a the
// tail itself is small.
template <int R>
LARES_INLINE void two_tails(const Vec (&a)[R], Vec (&tails)[R]) {
    constexpr float FACTORS[] = {-2.84171074e-6f, 3.94601884e-5f, -1.86578094e-4f, -1.35957991e-4f,
                                 7.06211245e-3f,  -5.24952449e-2f, -0.459208518f,   -1.15110517f};
    polynomial(FACTORS, a, tails);
    for (int r = 0; r < R; ++r) tails[r] = mul(a[r], tails[r]);
    exp2_in_range(tails);
}

// 1 - a phi(a) / Phi(-a): the factor of a tail in the derivative. Times the tail, it is accurate to 1e-8.
template <int R>
LARES_INLINE void tail_slope(const Vec (&a)[R], Vec (&factor)[R]) {
    constexpr float FACTORS[] = {2.5591894e-6f,   -4.47390812e-5f, 3.20619118e-4f, -1.06530311e-3f, -1.26827319e-4f,
                                 1.93704832e-2f, -0.109105125f,   -0.63660121f,   -0.797885716f,   1.0f};
    polynomial(FACTORS, a, factor);
}

// Computes x Phi(x) = max(x, 0) - |x| Phi(-|x|) in place for R registers.
template <int R, bool SLOPES>
LARES_INLINE void gelu(float* x, float* slopes) {
    Vec a[R], tails[R];
    // Beyond 8 the tail is zero.
    for (int r = 0; r < R; ++r) a[r] = min(broadcast(8.0f), abs(load(x + r * W)));
    two_tails(a, tails);
    if constexpr (SLOPES) {
        Vec factor[R];
        tail_slope(a, factor);
        for (int r = 0; r < R; ++r) {
            const Vec above = fma(mul(tails[r], broadcast(-0.5f)), factor[r], broadcast(0.5f));
            store(slopes + r * W, add(broadcast(0.5f), with_sign(above, load(x + r * W))));
        }
    }
    for (int r = 0; r < R; ++r) {
        store(x + r * W, fma(mul(a[r], broadcast(-0.5f)), tails[r], max(broadcast(0.0f), load(x + r * W))));
    }
}

template <bool SLOPES>
LARES_INLINE void gelu_all(float* x, std::int64_t n, float* slopes) {
    constexpr int R = W == 16 ? 6 : 4;
    std::int64_t i = 0;
    for (; i + R * W <= n; i += R * W) gelu<R, SLOPES>(x + i, SLOPES ? slopes + i : nullptr);
    for (; i < n; i += W) gelu<1, SLOPES>(x + i, SLOPES ? slopes + i : nullptr);
}

// Work in place on n floats, a multiple of a register. They are not inlined, because their constants and the sums of a
// product do not fit into the registers together.
__attribute__((noinline)) void gelu_all(float* x, std::int64_t n) { gelu_all<false>(x, n, nullptr); }

[[maybe_unused]] __attribute__((noinline)) void gelu_and_slope_all(float* x, std::int64_t n, float* slopes) { gelu_all<true>(x, n, slopes); }

}  // namespace
}  // namespace lares_fast
