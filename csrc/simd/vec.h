// One register of floats at the level this file is compiled for, and the few operations that the kernels need.
// Every unit that includes it is compiled once a level with that level's flags. All of it is in an anonymous namespace
// and nothing of the standard library's code is used: an inline function emitted with AVX-512 in one unit could
// otherwise be the copy that the linker keeps for all.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define LARES_INLINE inline __attribute__((always_inline))

namespace lares_fast {
namespace {

#if defined(__AVX512F__)

constexpr int W = 16;
using Vec = __m512;
using Mask = std::uint32_t;

LARES_INLINE Vec load(const float* from) { return _mm512_loadu_ps(from); }
LARES_INLINE void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
LARES_INLINE Vec broadcast(float x) { return _mm512_set1_ps(x); }
LARES_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
LARES_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
LARES_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
LARES_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
// The second operand where either is NaN.
LARES_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
LARES_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
LARES_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
LARES_INLINE Mask greater_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
LARES_INLINE Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
// Lanes of `v` in `keep`, close together from `to` on; writes W lanes, whatever `keep` is.
LARES_INLINE void compress(float* to, Mask keep, Vec v) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(keep), v));
}
LARES_INLINE void compress_ids(std::int32_t* to, Mask keep, std::int32_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(keep), _mm512_add_epi32(lanes, _mm512_set1_epi32(first))));
}

#elif defined(__AVX2__)

constexpr int W = 8;
using Vec = __m256;
using Mask = std::uint32_t;

LARES_INLINE Vec load(const float* from) { return _mm256_loadu_ps(from); }
LARES_INLINE void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
LARES_INLINE Vec broadcast(float x) { return _mm256_set1_ps(x); }
LARES_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
LARES_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
LARES_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
LARES_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
LARES_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
LARES_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
LARES_INLINE Mask bits(Vec lanes) { return static_cast<Mask>(_mm256_movemask_ps(lanes)); }
LARES_INLINE Mask greater(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
LARES_INLINE Mask greater_equal(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
LARES_INLINE Mask equal(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }

#else

// Four lanes that every supported CPU has as one register; gcc and clang lower the arithmetic element by element.
constexpr int W = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef std::int32_t Lanes __attribute__((vector_size(16)));
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
#else
LARES_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
LARES_INLINE Vec add(Vec a, Vec b) { return a + b; }
LARES_INLINE Vec sub(Vec a, Vec b) { return a - b; }
LARES_INLINE Vec mul(Vec a, Vec b) { return a * b; }
LARES_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
LARES_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
LARES_INLINE Mask bits(Lanes lanes) {
    const Lanes weighted = lanes & Lanes{1, 2, 4, 8};
    return static_cast<Mask>(weighted[0] | weighted[1] | weighted[2] | weighted[3]);
}
LARES_INLINE Mask greater(Vec a, Vec b) { return bits(a > b); }
LARES_INLINE Mask greater_equal(Vec a, Vec b) { return bits(a >= b); }
LARES_INLINE Mask equal(Vec a, Vec b) { return bits(a == b); }

#endif

#if !defined(__AVX512F__)
LARES_INLINE void compress(float* to, Mask keep, Vec v) {
    float lanes[W];
    store(lanes, v);
    for (; keep; keep &= keep - 1) *to++ = lanes[__builtin_ctz(keep)];
}
LARES_INLINE void compress_ids(std::int32_t* to, Mask keep, std::int32_t first) {
    for (; keep; keep &= keep - 1) *to++ = first + __builtin_ctz(keep);
}
#endif

// a * b + c of one lane, with the very rounding of `fma` above.
LARES_INLINE float fma_lane(float a, float b, float c) {
#if defined(__AVX2__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

LARES_INLINE int count(Mask mask) { return __builtin_popcount(mask); }

}  // namespace
}  // namespace lares_fast
