// Sums of products of bytes: one register of sums at the level this file is compiled for. Queries are unsigned codes with an
// offset, items are signed; a lane belongs to an item. Included where the level is avx2 or above.
#pragma once

#include "simd/vec.h"

namespace lares_fast {
namespace {

#if defined(__AVX512VNNI__)

// Four products a lane and step, summed in 32 bits.
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

// Two products a lane and step, summed modulo 2^16. That is exact as long as the sum without the offset fits 16 bits, which
// the norms of the codes ensure by Cauchy-Schwarz: whatever the offset adds and wraps, the start value takes away again.
// 127 * 127 * 2 does not saturate the instruction's own 16-bit sum of two products.
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
// In assembly, because with the items in a register of their own the sixteen do not suffice and a sum would live in memory.
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

// accumulate(sums, query, load_sums(items)).
#if !defined(LARES_ACCUMULATE_AT)
LARES_INLINE Sums accumulate_at(Sums sums, Sums query, const void* items) { return accumulate(sums, query, load_sums(items)); }
#endif

constexpr int CODE_SUMS = sizeof(Sums) / sizeof(CodeSum);

}  // namespace
}  // namespace lares_fast
