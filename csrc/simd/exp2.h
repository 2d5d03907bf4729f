// 2^x of a register, without the standard library: the same bits in every lane, tile and thread.
#pragma once

#include "simd/vec.h"

namespace lares_fast {
namespace {

constexpr float LOWEST_POWER = -125.0f;

// 2^x within 2 ulp for x in [-125, 127], exactly 1 at 0, and 2^-125 below; NaN stays NaN where its payload is zero.
LARES_INLINE Vec exp2(Vec x) {
    // Adding 1.5 * 2^23 rounds x to a whole number and leaves it in the lowest bits.
    const Vec shift = broadcast(12582912.0f);
    x = max(broadcast(LOWEST_POWER), x);
    const Vec whole = add(x, shift);
    const Vec f = sub(x, sub(whole, shift));
    // Least maximum relative error for f in [-1/2, 1/2] among polynomials of degree 5 with p(0) = 1.
    Vec p = fma(broadcast(0.001326472731307149f), f, broadcast(0.009671512991189957f));
    p = fma(p, f, broadcast(0.05550733581185341f));
    p = fma(p, f, broadcast(0.24022242426872253f));
    p = fma(p, f, broadcast(0.6931470036506653f));
    p = fma(p, f, broadcast(1.0f));
    return times_power(p, whole);
}

}  // namespace
}  // namespace lares_fast
