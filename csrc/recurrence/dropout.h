// Dropout decisions, 16 bits for each column or key. docs/numerics.md defines the addresses, and random/philox.h the random
// numbers.
#pragma once

#include "random/philox.h"
#include "recurrence/recurrence_kernel.h"
#include "simd/vec.h"

namespace lares_fast {
namespace {

constexpr int DRAWS = 16;  // decisions of one word of an address
using Keep = std::int16_t;  // -1 keeps, 0 drops

// The place of a dropout: the address without the row, the position and the column.
struct DropoutSite {
    DropoutSite(Key key, std::uint32_t at_threshold, std::uint32_t site, std::uint32_t at_step_and_layer)
        : threshold(at_threshold), scale(static_cast<float>(1 / (1 - at_threshold / 65536.0))), place(site << 16), step_and_layer(at_step_and_layer) {
        for (int round = 0; round < 10; ++round) {
            keys[round] = key;
            key.k0 += 0x9E3779B9u;
            key.k1 += 0xBB67AE85u;
        }
    }

    std::uint32_t threshold;  // 0 drops nothing
    float scale;              // factor of kept values
    std::uint32_t place, step_and_layer;
    Key keys[10];  // keys of the ten rounds
};

#if defined(__AVX2__)

// Four numbers of 32 bits, each in the low half of 64 bits. The high half may hold anything.
struct Four {
    using Word = __m256i;
    LARES_INLINE static Word all(std::uint32_t x) { return _mm256_set1_epi64x(x); }
    LARES_INLINE static Word times(Word a, Word b) { return _mm256_mul_epu32(a, b); }
    LARES_INLINE static Word upper(Word a) { return _mm256_srli_epi64(a, 32); }
    LARES_INLINE static Word differ(Word a, Word b) { return _mm256_xor_si256(a, b); }
};

// The ten rounds of Philox for even and odd counters.
template <class N>
LARES_INLINE void rounds(const DropoutSite& at, typename N::Word (&word)[2][4]) {
    using Word = typename N::Word;
    const Word m0 = N::all(0xD2511F53u), m1 = N::all(0xCD9E8D57u);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Word k0 = N::all(at.keys[round].k0), k1 = N::all(at.keys[round].k1);
        for (int odd = 0; odd < 2; ++odd) {
            Word(&w)[4] = word[odd];
            const Word p0 = N::times(w[0], m0), p1 = N::times(w[2], m1);
            w[0] = N::differ(N::upper(p1), N::differ(w[1], k0));
            w[2] = N::differ(N::upper(p0), N::differ(w[3], k1));
            w[1] = p1, w[3] = p0;
        }
    }
}

// The counters of one address differ in the low three bits of c0.
LARES_INLINE __m256i first_word(const DropoutSite& at, std::uint32_t c0, int odd) {
    return _mm256_or_si256(Four::all(c0 | at.place), _mm256_setr_epi64x(odd, 2 + odd, 4 + odd, 6 + odd));
}

// Decision i comes from half i % 2 of one word of counter i / 2.
LARES_INLINE void decide_lanes(__m256i even, __m256i odd, std::uint32_t threshold, Keep (&out)[DRAWS]) {
    const __m256i least = _mm256_set1_epi16(static_cast<short>(threshold));
    const __m256i draws = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_cmpeq_epi16(_mm256_max_epu16(draws, least), draws));
}

LARES_INLINE void draw(const DropoutSite& at, std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, Keep (&out)[4][DRAWS]) {
    __m256i word[2][4];
    for (int odd = 0; odd < 2; ++odd) {
        word[odd][0] = first_word(at, c0, odd);
        word[odd][1] = Four::all(c1), word[odd][2] = Four::all(c2), word[odd][3] = Four::all(at.step_and_layer);
    }
    rounds<Four>(at, word);
    for (int w = 0; w < 4; ++w) decide_lanes(word[0][w], word[1][w], at.threshold, out[w]);
}

#else

inline void draw(const DropoutSite& at, std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, Keep (&out)[4][DRAWS]) {
    std::uint8_t kept[4][16];
    keep_tile(c0 | at.place, c1, c2, at.step_and_layer, at.keys[0], at.threshold, kept);
    for (int w = 0; w < 4; ++w) {
        for (int i = 0; i < DRAWS; ++i) out[w][i] = static_cast<Keep>(-kept[w][i]);
    }
}

#endif

// Returns x in the kept lanes and 0 in the others.
LARES_INLINE Vec select(const Keep* kept, Vec x) {
#if defined(__AVX512F__)
    return _mm512_and_ps(x, _mm512_castsi512_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kept)))));
#elif defined(__AVX2__)
    return _mm256_and_ps(x, _mm256_castsi256_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kept)))));
#else
    return (Vec)((Ints)x & Ints{kept[0], kept[1], kept[2], kept[3]});
#endif
}

#if defined(__AVX512F__)

constexpr int DRAWN = 2;  // addresses that are drawn together, because the rounds of one address depend on each other

struct Eight {
    using Word = __m512i;
    LARES_INLINE static Word all(std::uint32_t x) { return _mm512_set1_epi64(x); }
    LARES_INLINE static Word times(Word a, Word b) { return _mm512_mul_epu32(a, b); }
    LARES_INLINE static Word upper(Word a) { return _mm512_srli_epi64(a, 32); }
    LARES_INLINE static Word differ(Word a, Word b) { return _mm512_xor_si512(a, b); }
};

LARES_INLINE __m512i join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

LARES_INLINE void draw(const DropoutSite& at, std::uint32_t c0, const std::uint32_t* c1, const std::uint32_t* c2, Keep (&out)[DRAWN][4][DRAWS]) {
    __m512i word[2][4];
    for (int odd = 0; odd < 2; ++odd) {
        const __m256i first = first_word(at, c0, odd);
        word[odd][0] = join(first, first);
        word[odd][1] = join(Four::all(c1[0]), Four::all(c1[1])), word[odd][2] = join(Four::all(c2[0]), Four::all(c2[1]));
        word[odd][3] = Eight::all(at.step_and_layer);
    }
    rounds<Eight>(at, word);
    for (int w = 0; w < 4; ++w) {
        decide_lanes(_mm512_castsi512_si256(word[0][w]), _mm512_castsi512_si256(word[1][w]), at.threshold, out[0][w]);
        decide_lanes(_mm512_extracti64x4_epi64(word[0][w], 1), _mm512_extracti64x4_epi64(word[1][w], 1), at.threshold, out[1][w]);
    }
}

#else

constexpr int DRAWN = 1;

LARES_INLINE void draw(const DropoutSite& at, std::uint32_t c0, const std::uint32_t* c1, const std::uint32_t* c2, Keep (&out)[DRAWN][4][DRAWS]) {
    draw(at, c0, *c1, *c2, out[0]);
}

#endif

// Draws the decisions of DRAWN rows of a hidden activation. The decisions of row i and panel p go to out[p * apart + i].
LARES_INLINE void draw_hidden(const DropoutSite& at, const std::uint32_t* row, const std::uint32_t* position, std::int64_t panels, std::int64_t apart,
                              Keep (*out)[DRAWS]) {
    for (std::int64_t p = 0; p < panels; p += 4) {
        Keep words[DRAWN][4][DRAWS];
        draw(at, static_cast<std::uint32_t>(p / 4) << 3, position, row, words);
        for (int i = 0; i < DRAWN; ++i) {
            for (std::int64_t w = 0; w < 4 && p + w < panels; ++w) std::memcpy(out[(p + w) * apart + i], words[i][w], sizeof words[i][w]);
        }
    }
}

// Draws the decisions of the queries 4 * quad ... 4 * quad + 3 for a tile of sixteen keys.
LARES_INLINE void draw_attention(const DropoutSite& at, std::uint32_t row, std::uint32_t head, std::uint32_t quad, std::uint32_t key_tile,
                                 Keep (&out)[4][DRAWS]) {
    draw(at, head << 3, quad | key_tile << 16, row, out);
}

}  // namespace
}  // namespace lares_fast
