// The operations of simd/vec.h in AVX-512 (F, BW, DQ and VL).
#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "simd/inline.h"

namespace lares_fast {
namespace {

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
LARES_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
LARES_INLINE float largest(Vec v) { return _mm512_reduce_max_ps(v); }
LARES_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
LARES_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
LARES_INLINE Vec abs(Vec v) { return _mm512_abs_ps(v); }
LARES_INLINE Vec with_sign(Vec v, Vec like) {
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(like), _mm512_set1_epi32(INT32_MIN));
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), sign));
}
LARES_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
LARES_INLINE Mask greater_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
LARES_INLINE Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
LARES_INLINE Vec select(Mask keep, Vec v) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(keep), v); }
LARES_INLINE Vec zero_below(Vec v, Vec x, Vec y) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, y, _CMP_NLT_UQ), v); }
LARES_INLINE Vec times_power(Vec v, Vec power) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), _mm512_slli_epi32(_mm512_castps_si512(power), 23)));
}
LARES_INLINE void compress(float* to, Mask keep, Vec v) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(keep), v));
}
LARES_INLINE void compress_ids(std::int32_t* to, Mask keep, std::int32_t first) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(keep), _mm512_add_epi32(lanes, _mm512_set1_epi32(first))));
}
LARES_INLINE void compress_ids(std::int32_t* to, Mask keep, const std::int32_t* from) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(keep), _mm512_loadu_si512(from)));
}
LARES_INLINE Mask not_less_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
using Excess = Mask;
LARES_INLINE Excess excess(Vec a, Vec b) { return not_less_equal(a, b); }
LARES_INLINE Excess either(Excess a, Excess b) { return a | b; }
LARES_INLINE bool any(Excess lanes) { return lanes != 0; }
template <class Rows>
LARES_INLINE void transpose4(const Rows& rows, Vec (&out)[4]) {
    Vec quarter[4];
    // Four rows are joined in one register by loads alone. That leaves two rounds of shuffles.
    for (int r = 0; r < 4; ++r) {
        Vec v = _mm512_castps128_ps512(_mm_loadu_ps(rows(r)));
        v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(rows(r + 4)));
        v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(rows(r + 8)));
        quarter[r] = _mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(rows(r + 12)));
    }
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(quarter[0], quarter[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(quarter[0], quarter[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(quarter[2], quarter[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(quarter[2], quarter[3]));
    out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
    out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
    out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
    out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
}
LARES_INLINE float fma_lane(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

}  // namespace
}  // namespace lares_fast
