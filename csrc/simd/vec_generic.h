// The operations of simd/vec.h for every supported CPU, in vector types of the compiler.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "simd/inline.h"

namespace lares_fast {
namespace {

// Four floats, which every supported CPU holds in one register. The compiler generates the instructions for these types.
constexpr int W = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef std::int32_t Ints __attribute__((vector_size(16)));
typedef std::uint32_t Words __attribute__((vector_size(16)));
using Mask = std::uint32_t;

LARES_INLINE Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
LARES_INLINE void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }
LARES_INLINE Vec broadcast(float x) { return Vec{x, x, x, x}; }
#if defined(__aarch64__)
LARES_INLINE Vec fma(Vec a, Vec b, Vec c) { return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
LARES_INLINE float fma_lane(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
LARES_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
LARES_INLINE float fma_lane(float a, float b, float c) { return a * b + c; }
#endif
LARES_INLINE Vec add(Vec a, Vec b) { return a + b; }
LARES_INLINE Vec sub(Vec a, Vec b) { return a - b; }
LARES_INLINE Vec mul(Vec a, Vec b) { return a * b; }
LARES_INLINE float sum(Vec v) { return (v[0] + v[2]) + (v[1] + v[3]); }
LARES_INLINE float largest(Vec v) {
    const float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
}
LARES_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
LARES_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
LARES_INLINE Vec abs(Vec v) { return (Vec)((Ints)v & INT32_MAX); }
LARES_INLINE Vec with_sign(Vec v, Vec like) { return (Vec)((Ints)v ^ ((Ints)like & INT32_MIN)); }
LARES_INLINE Mask bits(Ints lanes) {
    const Ints weighted = lanes & Ints{1, 2, 4, 8};
    return static_cast<Mask>(weighted[0] | weighted[1] | weighted[2] | weighted[3]);
}
LARES_INLINE Mask greater(Vec a, Vec b) { return bits(a > b); }
LARES_INLINE Mask greater_equal(Vec a, Vec b) { return bits(a >= b); }
LARES_INLINE Mask equal(Vec a, Vec b) { return bits(a == b); }
LARES_INLINE Vec select(Mask keep, Vec v) {
    const std::int32_t kept = static_cast<std::int32_t>(keep);
    const Ints lane{1, 2, 4, 8};
    return (Vec)((Ints)v & ((lane & Ints{kept, kept, kept, kept}) == lane));
}
LARES_INLINE Vec zero_below(Vec v, Vec x, Vec y) { return (Vec)((Words)v & ~(Words)(x < y)); }
LARES_INLINE Vec times_power(Vec v, Vec power) { return (Vec)((Words)v + ((Words)power << 23)); }
LARES_INLINE Mask not_less_equal(Vec a, Vec b) { return bits(~(a <= b)); }
using Excess = Ints;
LARES_INLINE Excess excess(Vec a, Vec b) { return ~(a <= b); }
LARES_INLINE Excess either(Excess a, Excess b) { return a | b; }
LARES_INLINE bool any(Excess lanes) { return bits(lanes) != 0; }
template <class Rows>
LARES_INLINE void transpose4(const Rows& rows, Vec (&out)[4]) {
    for (int c = 0; c < 4; ++c) out[c] = Vec{rows(0)[c], rows(1)[c], rows(2)[c], rows(3)[c]};
}
LARES_INLINE void compress(float* to, Mask keep, Vec v) {
    float lanes[W];
    store(lanes, v);
    for (; keep; keep &= keep - 1) *to++ = lanes[__builtin_ctz(keep)];
}
LARES_INLINE void compress_ids(std::int32_t* to, Mask keep, std::int32_t first) {
    for (; keep; keep &= keep - 1) *to++ = first + __builtin_ctz(keep);
}
LARES_INLINE void compress_ids(std::int32_t* to, Mask keep, const std::int32_t* from) {
    for (; keep; keep &= keep - 1) *to++ = from[__builtin_ctz(keep)];
}

}  // namespace
}  // namespace lares_fast
