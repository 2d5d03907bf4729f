// Items transposed to panels [D][PANEL]: a kernel then multiplies one broadcast query value with neighbouring items.
#pragma once

#include "simd/vec.h"

namespace lares_fast {
namespace {

#if defined(__AVX2__)

// Eight rows, eight columns: to[c * step + r] = from[r * stride + c].
LARES_INLINE void transpose_8x8(const float* from, std::int64_t stride, float* to, std::int64_t step) {
    __m256 half[8], pair[8];
    // Rows r and r + 4 meet in one register by loads alone, which leaves two rounds of shuffles.
    for (int r = 0; r < 4; ++r) {
        for (int c = 0; c < 2; ++c) {
            half[2 * r + c] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + r * stride + 4 * c)),
                                                   _mm_loadu_ps(from + (r + 4) * stride + 4 * c), 1);
        }
    }
    for (int c = 0; c < 2; ++c) {
        pair[4 * c + 0] = _mm256_unpacklo_ps(half[0 + c], half[2 + c]);
        pair[4 * c + 1] = _mm256_unpackhi_ps(half[0 + c], half[2 + c]);
        pair[4 * c + 2] = _mm256_unpacklo_ps(half[4 + c], half[6 + c]);
        pair[4 * c + 3] = _mm256_unpackhi_ps(half[4 + c], half[6 + c]);
    }
    const auto lo = [](__m256 a, __m256 b) { return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); };
    const auto hi = [](__m256 a, __m256 b) { return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(a), _mm256_castps_pd(b))); };
    for (int c = 0; c < 2; ++c) {
        _mm256_storeu_ps(to + (4 * c + 0) * step, lo(pair[4 * c], pair[4 * c + 2]));
        _mm256_storeu_ps(to + (4 * c + 1) * step, hi(pair[4 * c], pair[4 * c + 2]));
        _mm256_storeu_ps(to + (4 * c + 2) * step, lo(pair[4 * c + 1], pair[4 * c + 3]));
        _mm256_storeu_ps(to + (4 * c + 3) * step, hi(pair[4 * c + 1], pair[4 * c + 3]));
    }
}

#endif

// The first `rows` of PANEL rows [rows, D] to panel [D][PANEL]; missing rows become zeros.
template <int PANEL>
void pack_panel(const float* from, std::int64_t rows, std::int64_t D, float* panel) {
    if (rows < PANEL) {
        std::memset(panel, 0, sizeof(float) * PANEL * static_cast<std::size_t>(D));
    }
    std::int64_t row = 0;
#if defined(__AVX2__)
    for (; row + 8 <= rows; row += 8) {
        std::int64_t d = 0;
        for (; d + 8 <= D; d += 8) transpose_8x8(from + row * D + d, D, panel + d * PANEL + row, PANEL);
        for (; d < D; ++d) {
            for (int r = 0; r < 8; ++r) panel[d * PANEL + row + r] = from[(row + r) * D + d];
        }
    }
#endif
    for (; row < rows; ++row) {
        for (std::int64_t d = 0; d < D; ++d) panel[d * PANEL + row] = from[row * D + d];
    }
}

}  // namespace
}  // namespace lares_fast
