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
LARES_INLINE float sum(Vec v) { return _mm512_reduce_add_ps(v); }
LARES_INLINE float largest(Vec v) { return _mm512_reduce_max_ps(v); }
// The second operand where either is NaN.
LARES_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
LARES_INLINE Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
LARES_INLINE Vec abs(Vec v) { return _mm512_abs_ps(v); }
// v, negated where `like` is negative.
LARES_INLINE Vec with_sign(Vec v, Vec like) {
    const __m512i sign = _mm512_and_si512(_mm512_castps_si512(like), _mm512_set1_epi32(INT32_MIN));
    return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(v), sign));
}
LARES_INLINE Mask greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
LARES_INLINE Mask greater_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
LARES_INLINE Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
// Lanes of `v` in `keep`, zeros elsewhere.
LARES_INLINE Vec select(Mask keep, Vec v) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(keep), v); }
// v * 2^n for the n in the lowest bits of `power`, a float in [2^23, 2^24); v and the product are normal numbers.
LARES_INLINE Vec times_power(Vec v, Vec power) {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), _mm512_slli_epi32(_mm512_castps_si512(power), 23)));
}
// Lanes of `v` in `keep`, close together from `to` on; writes W lanes, whatever `keep` is.
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
// a <= b is not known to hold: true where either is NaN.
LARES_INLINE Mask not_less_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ); }
// The same for many pairs of registers, of which only any(...) is asked.
using Excess = Mask;
LARES_INLINE Excess excess(Vec a, Vec b) { return not_less_equal(a, b); }
LARES_INLINE Excess either(Excess a, Excess b) { return a | b; }
LARES_INLINE bool any(Excess lanes) { return lanes != 0; }
// out[c], lane r = rows[r][c] for W rows of four floats.
template <class Rows>
LARES_INLINE void transpose4(const Rows& rows, Vec (&out)[4]) {
    Vec quarter[4];
    // Four rows meet in one register by loads alone, which leaves two rounds of shuffles.
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

#else

// Four lanes that every supported CPU has as one register; gcc and clang lower the arithmetic element by element.
constexpr int W = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef std::int32_t Lanes __attribute__((vector_size(16)));
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
#else
LARES_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
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
LARES_INLINE Vec abs(Vec v) { return (Vec)((Lanes)v & INT32_MAX); }
LARES_INLINE Vec with_sign(Vec v, Vec like) { return (Vec)((Lanes)v ^ ((Lanes)like & INT32_MIN)); }
LARES_INLINE Mask bits(Lanes lanes) {
    const Lanes weighted = lanes & Lanes{1, 2, 4, 8};
    return static_cast<Mask>(weighted[0] | weighted[1] | weighted[2] | weighted[3]);
}
LARES_INLINE Mask greater(Vec a, Vec b) { return bits(a > b); }
LARES_INLINE Mask greater_equal(Vec a, Vec b) { return bits(a >= b); }
LARES_INLINE Mask equal(Vec a, Vec b) { return bits(a == b); }
LARES_INLINE Vec select(Mask keep, Vec v) {
    const std::int32_t kept = static_cast<std::int32_t>(keep);
    const Lanes lane{1, 2, 4, 8};
    return (Vec)((Lanes)v & ((lane & Lanes{kept, kept, kept, kept}) == lane));
}
LARES_INLINE Vec times_power(Vec v, Vec power) { return (Vec)((Words)v + ((Words)power << 23)); }
LARES_INLINE Mask not_less_equal(Vec a, Vec b) { return bits(~(a <= b)); }
using Excess = Lanes;
LARES_INLINE Excess excess(Vec a, Vec b) { return ~(a <= b); }
LARES_INLINE Excess either(Excess a, Excess b) { return a | b; }
LARES_INLINE bool any(Excess lanes) { return bits(lanes) != 0; }
template <class Rows>
LARES_INLINE void transpose4(const Rows& rows, Vec (&out)[4]) {
    for (int c = 0; c < 4; ++c) out[c] = Vec{rows(0)[c], rows(1)[c], rows(2)[c], rows(3)[c]};
}

#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// order[mask]: the lanes of `mask`, close together, a byte each.
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
constexpr LaneOrders LANES_OF;

LARES_INLINE __m256i lanes_of(Mask keep) { return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<long long>(LANES_OF.order[keep]))); }
LARES_INLINE void compress(float* to, Mask keep, Vec v) { store(to, _mm256_permutevar8x32_ps(v, lanes_of(keep))); }
LARES_INLINE void compress_ids(std::int32_t* to, Mask keep, std::int32_t first) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi32(lanes_of(keep), _mm256_set1_epi32(first)));
}
LARES_INLINE void compress_ids(std::int32_t* to, Mask keep, const std::int32_t* from) {
    const __m256i ids = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(ids, lanes_of(keep)));
}
#elif !defined(__AVX512F__)
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
#endif

// a * b + c of one lane, with the very rounding of `fma` above.
LARES_INLINE float fma_lane(float a, float b, float c) {
#if defined(__AVX2__) || defined(__aarch64__)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// Lane r = rows[r][0].
template <class Rows>
LARES_INLINE Vec gather(const Rows& rows) {
    float lanes[W];
    for (int r = 0; r < W; ++r) lanes[r] = *rows(r);
    return load(lanes);
}

constexpr Mask ALL = (1u << W) - 1;

// The first n lanes, for any n.
LARES_INLINE Mask first_lanes(std::int64_t n) { return n >= W ? ALL : n > 0 ? (1u << n) - 1 : 0; }

LARES_INLINE int count(Mask mask) { return __builtin_popcount(mask); }

}  // namespace
}  // namespace lares_fast
