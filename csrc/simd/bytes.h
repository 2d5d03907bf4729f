// Sums of products of bytes, one register of sums at a time. Queries are unsigned codes with an offset, items are signed
// codes, and each lane belongs to one item. Only files compiled for AVX2 or above include this header.
#pragma once

#include "simd/vec.h"

namespace lares_fast {
namespace {

#if defined(__AVX512VNNI__)

// A step adds four products to each lane, in 32 bits.
constexpr int GROUP = 4;
constexpr int OFFSET = 128;
using CodeSum = std::int32_t;
using Sums = __m512i;
LARES_INLINE Sums load_sums(const void* from) { return _mm512_loadu_si512(from); }
LARES_INLINE Sums broadcast_word(std::int32_t word) { return _mm512_set1_epi32(word); }
LARES_INLINE Sums accumulate(Sums sums, Sums query, Sums items) { return _mm512_dpbusd_epi32(sums, query, items); }
LARES_INLINE Sums largest(Sums a, Sums b) { return _mm512_max_epi32(a, b); }
LARES_INLINE std::uint64_t above(Sums a, Sums b) { return _mm512_cmpgt_epi32_mask(a, b); }

#else

// A step adds two products to each lane, modulo 2^16. The result is exact if the sum without the offset fits into 16 bits.
// The norms of the codes ensure that (Cauchy-Schwarz). The start value removes what the offset adds, including any
// wrap-around. The instruction's own 16-bit sum of two products does not saturate, because 127 * 127 * 2 fits.
constexpr int GROUP = 2;
constexpr int OFFSET = 64;
using CodeSum = std::int16_t;
#if defined(__AVX512BW__)
using Sums = __m512i;
LARES_INLINE Sums load_sums(const void* from) { return _mm512_loadu_si512(from); }
LARES_INLINE Sums broadcast_word(std::int32_t word) { return _mm512_set1_epi32(word); }
LARES_INLINE Sums accumulate(Sums sums, Sums query, Sums items) { return _mm512_add_epi16(sums, _mm512_maddubs_epi16(query, items)); }
LARES_INLINE Sums largest(Sums a, Sums b) { return _mm512_max_epi16(a, b); }
LARES_INLINE std::uint64_t above(Sums a, Sums b) { return _mm512_cmpgt_epi16_mask(a, b); }
#else
using Sums = __m256i;
LARES_INLINE Sums load_sums(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
LARES_INLINE Sums broadcast_word(std::int32_t word) { return _mm256_set1_epi32(word); }
LARES_INLINE Sums accumulate(Sums sums, Sums query, Sums items) { return _mm256_add_epi16(sums, _mm256_maddubs_epi16(query, items)); }
// This is assembly because the items must stay in memory: with a register for them the sixteen registers do not suffice,
// and the compiler would keep a sum in memory.
#define LARES_ACCUMULATE_AT
LARES_INLINE Sums accumulate_at(Sums sums, Sums query, const void* items) {
    Sums products;
    asm("vpmaddubsw %2, %1, %0" : "=x"(products) : "x"(query), "m"(*static_cast<const __m256i_u*>(items)));
    return _mm256_add_epi16(sums, products);
}
LARES_INLINE Sums largest(Sums a, Sums b) { return _mm256_max_epi16(a, b); }
LARES_INLINE std::uint64_t above(Sums a, Sums b) {
    const __m256i bytes = _mm256_packs_epi16(_mm256_cmpgt_epi16(a, b), _mm256_setzero_si256());
    return static_cast<std::uint32_t>(_mm256_movemask_epi8(_mm256_permute4x64_epi64(bytes, 0xd8)));
}
#endif

#endif

// Equals accumulate(sums, query, load_sums(items)).
#if !defined(LARES_ACCUMULATE_AT)
LARES_INLINE Sums accumulate_at(Sums sums, Sums query, const void* items) { return accumulate(sums, query, load_sums(items)); }
#endif

constexpr int CODE_SUMS = sizeof(Sums) / sizeof(CodeSum);

}  // namespace
}  // namespace lares_fast
