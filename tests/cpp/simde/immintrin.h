// The compiler finds this file before its own header of this name. SIMDe emulates the AVX-512 intrinsics on a CPU that has
// AVX2 and FMA.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstdint>

// SIMDe 0.7.4 does not have this one.
static inline __mmask32 emulated_cmpgt_epi16_mask(__m512i a, __m512i b) {
    std::int16_t left[32], right[32];
    __builtin_memcpy(left, &a, sizeof left);
    __builtin_memcpy(right, &b, sizeof right);
    __mmask32 mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= static_cast<__mmask32>(left[lane] > right[lane]) << lane;
    return mask;
}
#define _mm512_cmpgt_epi16_mask emulated_cmpgt_epi16_mask

// Joins pairs that are half the lanes apart, as the compiler's own intrinsic does.
template <class Join>
static inline float emulated_reduce_ps(__m512 v, const Join& join) {
    float lanes[16];
    __builtin_memcpy(lanes, &v, sizeof lanes);
    for (int apart = 8; apart > 0; apart /= 2) {
        for (int lane = 0; lane < apart; ++lane) lanes[lane] = join(lanes[lane], lanes[lane + apart]);
    }
    return lanes[0];
}
static inline float emulated_reduce_add_ps(__m512 v) {
    return emulated_reduce_ps(v, [](float a, float b) { return a + b; });
}
static inline float emulated_reduce_max_ps(__m512 v) {
    return emulated_reduce_ps(v, [](float a, float b) { return a > b ? a : b; });
}
#define _mm512_reduce_add_ps emulated_reduce_add_ps
#define _mm512_reduce_max_ps emulated_reduce_max_ps

static inline __m512i emulated_cvtepi16_epi32(__m256i v) {
    std::int16_t narrow[16];
    std::int32_t wide[16];
    __builtin_memcpy(narrow, &v, sizeof narrow);
    for (int lane = 0; lane < 16; ++lane) wide[lane] = narrow[lane];
    __m512i result;
    __builtin_memcpy(&result, wide, sizeof wide);
    return result;
}
#define _mm512_cvtepi16_epi32 emulated_cvtepi16_epi32

// These choose the level of the sources. Before SIMDe they would make it use the compiler's own intrinsics.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#if defined(VNNI_BY_SIMDE)
#define __AVX512VNNI__ 1
#endif
