// 2^x of a register, without the standard library: the bits are the same in every lane, tile and thread.
#pragma once

#include "simd/vec.h"

namespace lares_fast {
namespace {

// p = factors[0] x^(N - 1) + ... + factors[N - 1].
template <int N, int R>
LARES_INLINE void polynomial(const float (&factors)[N], const Vec (&x)[R], Vec (&p)[R]) {
    for (int r = 0; r < R; ++r) p[r] = broadcast(factors[0]);
#pragma GCC unroll 16
    for (int i = 1; i < N; ++i) {
        for (int r = 0; r < R; ++r) p[r] = fma(p[r], x[r], broadcast(factors[i]));
    }
}

constexpr float LOWEST_POWER = -125.0f;

// Adding 1.5 * 2^23 rounds to an integer and leaves it in the lowest bits.
constexpr float SHIFT = 12582912.0f;

// Sets p to 2^x for x in [-1/2, 1/2].
template <int R>
LARES_INLINE void exp2_of_fraction(const Vec (&x)[R], Vec (&p)[R]) {
    // The polynomial of degree 6 with p(0) = 1 that has the least maximum relative error.
    constexpr float FACTORS[] = {0.0001535336190842864f, 0.0013398874414117072f, 0.009618437357673572f, 0.055503324711259225f,
                                 0.2402264791362874f,    0.6931472028550651f,    1.0f};
    polynomial(FACTORS, x, p);
}

// Replaces x by 2^x within 1 ulp for x in [-125, 127]. 2^0 is exactly 1, and NaN stays NaN if its payload is zero. Each
// step is done for all registers before the next step, because a single register would make the processor wait for every
// result.
template <int R>
LARES_INLINE void exp2_in_range(Vec (&x)[R]) {
    const Vec shift = broadcast(SHIFT);
    Vec whole[R], p[R];
    for (int r = 0; r < R; ++r) whole[r] = add(x[r], shift);
    for (int r = 0; r < R; ++r) x[r] = sub(x[r], sub(whole[r], shift));
    exp2_of_fraction(x, p);
    for (int r = 0; r < R; ++r) x[r] = times_power(p[r], whole[r]);
}

// Replaces x by 2^(x (base + rest)) within 2 ulp where that is at most 2^127, and by 0 where it is below 2^-125.5. `rest` is the
// rounding error of the factor `base`. With fma, the product loses no digits before its whole part is subtracted.
template <int R>
LARES_INLINE void exp2_of_product(Vec (&x)[R], Vec base, Vec rest) {
    const Vec shift = broadcast(SHIFT), lowest = broadcast(SHIFT + LOWEST_POWER);
    Vec whole[R], p[R];
    for (int r = 0; r < R; ++r) whole[r] = fma(x[r], base, shift);
    for (int r = 0; r < R; ++r) x[r] = fma(x[r], rest, fma(x[r], base, sub(shift, whole[r])));
    exp2_of_fraction(x, p);
    for (int r = 0; r < R; ++r) x[r] = zero_below(times_power(p[r], whole[r]), whole[r], lowest);
}

// Works for every x up to 127, and gives 2^-125 for x below -125.
template <int R>
LARES_INLINE void exp2(Vec (&x)[R]) {
    for (int r = 0; r < R; ++r) x[r] = max(broadcast(LOWEST_POWER), x[r]);
    exp2_in_range(x);
}

LARES_INLINE Vec exp2(Vec x) {
    Vec one[1] = {x};
    exp2(one);
    return one[0];
}

}  // namespace
}  // namespace lares_fast
