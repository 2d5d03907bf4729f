// Stands before the compiler's header of this name: AVX-512 intrinsics by SIMDe, for a CPU that has AVX2 and FMA only.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#include <cstdint>

// Not in SIMDe 0.7.4.
static inline __mmask32 emulated_cmpgt_epi16_mask(__m512i a, __m512i b) {
    std::int16_t left[32], right[32];
    __builtin_memcpy(left, &a, sizeof left);
    __builtin_memcpy(right, &b, sizeof right);
    __mmask32 mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= static_cast<__mmask32>(left[lane] > right[lane]) << lane;
    return mask;
}
#define _mm512_cmpgt_epi16_mask emulated_cmpgt_epi16_mask

// Choose the sources' level; not before SIMDe, which would then take the compiler's own intrinsics.
#define __AVX512F__ 1
#define __AVX512BW__ 1
#if defined(VNNI_BY_SIMDE)
#define __AVX512VNNI__ 1
#endif
