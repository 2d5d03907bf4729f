// The operations of simd/vec.h in AVX2 with FMA.
#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "simd/inline.h"

namespace lares_fast {
namespace {

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
LARES_INLINE float sum(Vec v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
LARES_INLINE float largest(Vec v) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
LARES_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
LARES_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
LARES_INLINE Vec abs(Vec v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v); }
LARES_INLINE Vec with_sign(Vec v, Vec like) { return _mm256_xor_ps(v, _mm256_and_ps(like, _mm256_set1_ps(-0.0f))); }
LARES_INLINE Mask bits(Vec lanes) { return static_cast<Mask>(_mm256_movemask_ps(lanes)); }
LARES_INLINE Mask greater(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
LARES_INLINE Mask greater_equal(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_GE_OQ)); }
LARES_INLINE Mask equal(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)); }
LARES_INLINE Vec select(Mask keep, Vec v) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i kept = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(keep)), lane);
    return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(kept, lane)), v);
}
LARES_INLINE Vec zero_below(Vec v, Vec x, Vec y) { return _mm256_and_ps(v, _mm256_cmp_ps(x, y, _CMP_NLT_UQ)); }
LARES_INLINE Vec times_power(Vec v, Vec power) {
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), _mm256_slli_epi32(_mm256_castps_si256(power), 23)));
}
LARES_INLINE Mask not_less_equal(Vec a, Vec b) { return bits(_mm256_cmp_ps(a, b, _CMP_NLE_UQ)); }
using Excess = Vec;
LARES_INLINE Excess excess(Vec a, Vec b) { return _mm256_cmp_ps(a, b, _CMP_NLE_UQ); }
LARES_INLINE Excess either(Excess a, Excess b) { return _mm256_or_ps(a, b); }
LARES_INLINE bool any(Excess lanes) { return bits(lanes) != 0; }
template <class Rows>
LARES_INLINE void transpose4(const Rows& rows, Vec (&out)[4]) {
    Vec half[4];
    for (int r = 0; r < 4; ++r) {
        half[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows(r))), _mm_loadu_ps(rows(r + 4)), 1);
    }
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(half[0], half[1]));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(half[0], half[1]));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(half[2], half[3]));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(half[2], half[3]));
    out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23));
    out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23));
    out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23));
    out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23));
}
LARES_INLINE float fma_lane(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// order[mask] holds the numbers of the lanes in `mask`, one after the other, one byte each.
struct LaneOrders {
    std::uint64_t order[256] = {};
    constexpr LaneOrders() {
        for (unsigned mask = 0; mask < 256; ++mask) {
            int place = 0;
            for (unsigned lane = 0; lane < 8; ++lane) {
                if (mask >> lane & 1) order[mask] |= std::uint64_t{lane} << 8 * place++;
            }
        }
    }
};
constexpr LaneOrders LANE_ORDERS;

LARES_INLINE __m256i lanes_of(Mask keep) { return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(LANE_ORDERS.order[keep]))); }
LARES_INLINE void compress(float* to, Mask keep, Vec v) { store(to, _mm256_permutevar8x32_ps(v, lanes_of(keep))); }
LARES_INLINE void compress_ids(std::int32_t* to, Mask keep, std::int32_t first) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi32(lanes_of(keep), _mm256_set1_epi32(first)));
}
LARES_INLINE void compress_ids(std::int32_t* to, Mask keep, const std::int32_t* from) {
    const __m256i ids = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(ids, lanes_of(keep)));
}

}  // namespace
}  // namespace lares_fast
