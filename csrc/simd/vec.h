// One register of floats of the instruction set that a file is compiled for, and the operations that the kernels need.
//
// A kernel file is compiled once for each instruction set. For that reason everything here is in an anonymous namespace, and
// nothing of the standard library's code is used: the linker keeps one copy of an inline function for all files, and that copy
// could hold AVX-512 instructions.
//
// Each instruction set has its own file, which defines:
//   W, Vec, Mask             floats of a register, the register, one bit for each lane
//   load, store              memory need not be aligned
//   broadcast, add, sub, mul
//   fma(a, b, c)             a * b + c, rounded once if the instruction set can do that
//   fma_lane(a, b, c)        fma for one float, with the same rounding
//   sum, largest             over the lanes of a register
//   max(a, b), min(a, b)     the second operand where either is NaN
//   abs, with_sign(v, like)  with_sign negates v where `like` is negative
//   greater, greater_equal, equal
//   not_less_equal(a, b)     true also where either is NaN
//   Excess, excess(a, b), either, any(...)
//                            not_less_equal of many pairs of registers, when only any(...) is needed
//   select(keep, v)          the lanes of v in `keep`, zeros in the others
//   zero_below(v, x, y)      v, with zeros in the lanes where x is below y; a lane where x or y is NaN keeps v
//   times_power(v, power)    v * 2^n; n is in the lowest bits of `power`, a float in [2^23, 2^24); v and the result are normal
//   compress(to, keep, v)    the lanes of v in `keep`, one after the other from `to` on; writes up to W lanes whatever `keep` is
//   compress_ids(to, keep, first or from)
//                            compress for first, first + 1, ... or for the integers at `from`
//   transpose4(rows, out)    out[c], lane r = rows(r)[c], for W rows of four floats
#pragma once

#include "simd/inline.h"

#if defined(__AVX2__)
// This must come before the choice: when tests emulate AVX-512, this header defines __AVX512F__.
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#include "simd/vec_avx512.h"
#elif defined(__AVX2__)
#include "simd/vec_avx2.h"
#else
#include "simd/vec_generic.h"
#endif

namespace lares_fast {
namespace {

// Lane r of the result is *rows(r).
template <class Rows>
LARES_INLINE Vec gather(const Rows& rows) {
    float lanes[W];
    for (int r = 0; r < W; ++r) lanes[r] = *rows(r);
    return load(lanes);
}

constexpr Mask ALL = (1u << W) - 1;

// A mask of the first n lanes, for any n.
LARES_INLINE Mask first_lanes(std::int64_t n) { return n >= W ? ALL : n > 0 ? (1u << n) - 1 : 0; }

LARES_INLINE int count(Mask mask) { return __builtin_popcount(mask); }

}  // namespace
}  // namespace lares_fast
