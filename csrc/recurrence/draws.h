// Dropout decisions, one 16-bit lane a column or key: the addresses of docs/numerics.md, the draws of random/philox.h.
#pragma once

#include "random/philox.h"
#include "recurrence/recurrence_kernel.h"
#include "simd/vec.h"

namespace lares_fast {
namespace {

constexpr int LANES = 16;  // of one word of an address
using Lane = std::int16_t;  // -1 what is kept, 0 what is dropped

// Where a dropout stands: all of the address but the row, the position and the column.
struct Site {
    Site(Key key, std::uint32_t at_threshold, std::uint32_t site, std::uint32_t at_step_and_layer)
        : threshold(at_threshold), scale(static_cast<float>(1 / (1 - at_threshold / 65536.0))), place(site << 16), step_and_layer(at_step_and_layer) {
        for (int round = 0; round < 10; ++round) {
            keys[round] = key;
            key.k0 += 0x9E3779B9u;
            key.k1 += 0xBB67AE85u;
        }
    }

    std::uint32_t threshold;  // 0 drops nothing
    float scale;              // of what is kept
    std::uint32_t place, step_and_layer;
    Key keys[10];  // of the rounds
};

#if defined(__AVX2__)

// Eight counters that differ in the low three bits of c0: lane i of out[w] is half i % 2 of word w of counter i / 2.
LARES_INLINE void draw(const Site& at, std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, Lane (&out)[4][LANES]) {
    const auto wide = [](std::uint32_t x) { return _mm256_set1_epi64x(x); };
    const __m256i m0 = wide(0xD2511F53u), m1 = wide(0xCD9E8D57u);
    // Even and odd counters apart, each in the low half of 64 bits; what is in the high half does not matter.
    __m256i word[2][4];
    for (int odd = 0; odd < 2; ++odd) {
        word[odd][0] = _mm256_or_si256(wide(c0 | at.place), _mm256_setr_epi64x(odd, 2 + odd, 4 + odd, 6 + odd));
        word[odd][1] = wide(c1), word[odd][2] = wide(c2), word[odd][3] = wide(at.step_and_layer);
    }
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const __m256i k0 = _mm256_set1_epi32(static_cast<int>(at.keys[round].k0)), k1 = _mm256_set1_epi32(static_cast<int>(at.keys[round].k1));
        for (int odd = 0; odd < 2; ++odd) {
            __m256i(&w)[4] = word[odd];
            const __m256i p0 = _mm256_mul_epu32(w[0], m0), p1 = _mm256_mul_epu32(w[2], m1);
            w[0] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(w[1], k0));
            w[2] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(w[3], k1));
            w[1] = p1, w[3] = p0;
        }
    }
    const __m256i least = _mm256_set1_epi16(static_cast<short>(at.threshold));
    for (int w = 0; w < 4; ++w) {
        const __m256i draws = _mm256_blend_epi32(word[0][w], _mm256_slli_epi64(word[1][w], 32), 0xaa);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out[w]), _mm256_cmpeq_epi16(_mm256_max_epu16(draws, least), draws));
    }
}

#else

inline void draw(const Site& at, std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, Lane (&out)[4][LANES]) {
    std::uint8_t kept[4][16];
    keep_tile(c0 | at.place, c1, c2, at.step_and_layer, at.keys[0], at.threshold, kept);
    for (int w = 0; w < 4; ++w) {
        for (int i = 0; i < LANES; ++i) out[w][i] = static_cast<Lane>(-kept[w][i]);
    }
}

#endif

// x in the lanes that are kept, 0 elsewhere.
LARES_INLINE Vec select(const Lane* kept, Vec x) {
#if defined(__AVX512F__)
    return _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kept)))));
#elif defined(__AVX2__)
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kept)))));
#else
    return (Vec)((Lanes)x & Lanes{kept[0], kept[1], kept[2], kept[3]});
#endif
}

// The decisions of one row of a hidden activation, panel by panel, `apart` lanes from one to the next.
LARES_INLINE void draw_hidden(const Site& at, std::uint32_t row, std::uint32_t position, std::int64_t panels, std::int64_t apart, Lane* out) {
    for (std::int64_t p = 0; p < panels; p += 4) {
        Lane words[4][LANES];
        draw(at, static_cast<std::uint32_t>(p / 4) << 3, position, row, words);
        for (std::int64_t w = 0; w < 4 && p + w < panels; ++w) std::memcpy(out + (p + w) * apart, words[w], sizeof words[w]);
    }
}

// Those of the queries 4 * quad ... 4 * quad + 3 for a tile of sixteen keys.
LARES_INLINE void draw_attention(const Site& at, std::uint32_t row, std::uint32_t head, std::uint32_t quad, std::uint32_t key_tile,
                                 Lane (&out)[4][LANES]) {
    draw(at, head << 3, quad | key_tile << 16, row, out);
}

}  // namespace
}  // namespace lares_fast
