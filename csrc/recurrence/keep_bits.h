// Dropout decisions as bits, sixteen columns or keys a word: the addresses of docs/numerics.md, the draws of random/philox.h.
#pragma once

#include "random/philox.h"
#include "recurrence/recurrence_kernel.h"
#include "simd/vec.h"

namespace lares_fast {
namespace {

#if defined(__AVX2__)

// Eight counters that differ in the low three bits of c0. Bit i of out[w] says whether half i % 2 of word w of counter
// i / 2 is at least `threshold`.
LARES_INLINE void draw_bits(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, Key key, std::uint32_t threshold,
                            std::uint16_t (&out)[4]) {
    const auto wide = [](std::uint32_t x) { return _mm256_set1_epi64x(x); };
    const __m256i m0 = wide(0xD2511F53u), m1 = wide(0xCD9E8D57u);
    // Even and odd counters apart, each in the low half of 64 bits; what is in the high half does not matter.
    __m256i word[2][4];
    for (int odd = 0; odd < 2; ++odd) {
        word[odd][0] = _mm256_or_si256(wide(c0), _mm256_setr_epi64x(odd, 2 + odd, 4 + odd, 6 + odd));
        word[odd][1] = wide(c1), word[odd][2] = wide(c2), word[odd][3] = wide(c3);
    }
    for (int round = 0; round < 10; ++round) {
        const __m256i k0 = wide(key.k0), k1 = wide(key.k1);
        for (int odd = 0; odd < 2; ++odd) {
            __m256i(&w)[4] = word[odd];
            const __m256i p0 = _mm256_mul_epu32(w[0], m0), p1 = _mm256_mul_epu32(w[2], m1);
            w[0] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(w[1], k0));
            w[2] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(w[3], k1));
            w[1] = p1, w[3] = p0;
        }
        key.k0 += 0x9E3779B9u;
        key.k1 += 0xBB67AE85u;
    }
    const __m256i least = _mm256_set1_epi16(static_cast<short>(threshold));
    __m256i kept[4];
    for (int w = 0; w < 4; ++w) {
        const __m256i draws = _mm256_blend_epi32(word[0][w], _mm256_slli_epi64(word[1][w], 32), 0xaa);
        kept[w] = _mm256_cmpeq_epi16(_mm256_max_epu16(draws, least), draws);
    }
    for (int w = 0; w < 4; w += 2) {
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(kept[w], kept[w + 1]), 0xd8);
        const auto bits = static_cast<std::uint32_t>(_mm256_movemask_epi8(bytes));
        out[w] = static_cast<std::uint16_t>(bits);
        out[w + 1] = static_cast<std::uint16_t>(bits >> 16);
    }
}

#else

inline void draw_bits(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, Key key, std::uint32_t threshold,
                      std::uint16_t (&out)[4]) {
    std::uint8_t kept[4][16];
    keep_tile(c0, c1, c2, c3, key, threshold, kept);
    for (int w = 0; w < 4; ++w) {
        std::uint32_t bits = 0;
        for (int i = 0; i < 16; ++i) bits |= static_cast<std::uint32_t>(kept[w][i]) << i;
        out[w] = static_cast<std::uint16_t>(bits);
    }
}

#endif

LARES_INLINE float kept_scale(std::uint32_t threshold) { return static_cast<float>(1 / (1 - threshold / 65536.0)); }

// Where a dropout stands: all of the address but the row, the position and the column.
struct Site {
    Key key;
    std::uint32_t threshold, site, step_and_layer;
};

// bits[panel * apart] for the panels of one row of a hidden activation.
LARES_INLINE void draw_hidden(const Site& at, std::uint32_t row, std::uint32_t position, std::int64_t panels, std::int64_t apart, std::uint16_t* bits) {
    for (std::int64_t p = 0; p < panels; p += 4) {
        std::uint16_t words[4];
        draw_bits(static_cast<std::uint32_t>(p / 4) << 3 | at.site << 16, position, row, at.step_and_layer, at.key, at.threshold, words);
        for (std::int64_t w = 0; w < 4 && p + w < panels; ++w) bits[(p + w) * apart] = words[w];
    }
}

// bits[q] of query 4 * quad + q for sixteen keys.
LARES_INLINE void draw_attention(const Site& at, std::uint32_t row, std::uint32_t head, std::uint32_t quad, std::uint32_t key_tile,
                                 std::uint16_t (&bits)[4]) {
    draw_bits(head << 3 | at.site << 16, quad | key_tile << 16, row, at.step_and_layer, at.key, at.threshold, bits);
}

}  // namespace
}  // namespace lares_fast
