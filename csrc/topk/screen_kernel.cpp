#include "topk/screen_kernel.h"

#include "topk/candidates.h"
#include "topk/index.h"
#include "topk/scores.h"

namespace lares_fast {
namespace {

// Survivors wait until a vector of them can be scored at once; one panel more may come before that.
constexpr std::int64_t STRIDE = 2 * W + PANEL + W;
// Survivors cost about as much as thirty screened items: above this share fp32 is the faster way.
constexpr float SHARE = 0.03f;
constexpr float BURST = 0.5f;  // of a panel, beyond the share
constexpr float ROUNDING = 1.2e-7f;

float root(float x) { return __builtin_sqrtf(x); }

void build(const float* items, std::int64_t N, std::int64_t D, const IndexTables& t, std::int64_t first_panel, std::int64_t last_panel) {
    const std::int64_t words = (D + 3) / 4;
    float centre_norm = 0;
    for (std::int64_t d = 0; d < D; ++d) centre_norm += t.centre[d] * t.centre[d];
    centre_norm = root(centre_norm);
    const float sum_error = static_cast<float>(D + 16) * ROUNDING;
    for (std::int64_t p = first_panel; p < last_panel; ++p) {
        const float* from = items + p * PANEL * D;
        const std::int64_t rows = N - p * PANEL < PANEL ? N - p * PANEL : PANEL;
        std::int8_t* codes = t.codes + p * words * PANEL * 4;
        std::memset(codes, 0, static_cast<std::size_t>(words * PANEL * 4));
        float largest = 0;
        bool finite = true;
        for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t d = 0; d < D; ++d) {
                const float distance = __builtin_fabsf(from[r * D + d] - t.centre[d]);
                finite &= distance < 1e30f;
                largest = largest > distance ? largest : distance;
            }
        }
        const bool usable = finite && (largest == 0 || largest > 1e-30f);
        const float scale = usable && largest > 0 ? largest / 127.0f : 1.0f;
        const float inverse = 1.0f / scale;
        float residual = 0, coded = 0, norm = 0;
        for (std::int64_t r = 0; r < rows; ++r) {
            float row_residual = 0, row_coded = 0, row_norm = 0;
            std::int32_t sum = 0;
            for (std::int64_t d = 0; d < D; ++d) {
                const float x = from[r * D + d] - t.centre[d];
                const float code = usable ? __builtin_rintf(x * inverse) : 0.0f;
                const float left = x - code * scale;
                row_residual += left * left;
                row_coded += code * code;
                row_norm += from[r * D + d] * from[r * D + d];
                sum += static_cast<std::int32_t>(code);
                codes[((d / 4) * PANEL + r) * 4 + d % 4] = static_cast<std::int8_t>(code);
            }
            t.start[p * PANEL + r] = -128 * sum;
            residual = residual > row_residual ? residual : row_residual;
            coded = coded > row_coded ? coded : row_coded;
            norm = norm > row_norm ? norm : row_norm;
        }
        for (std::int64_t r = rows; r < PANEL; ++r) t.start[p * PANEL + r] = 0;
        // The sums above round too; two parts in a hundred thousand cover that for any D that is screened. A panel without
        // a usable scale gets an infinite bound: all its items survive.
        constexpr float up = 1.00002f;
        float* bounds = t.bounds + 3 * p;
        bounds[0] = inverse;
        bounds[1] = usable ? up * (root(residual) + sum_error * (root(norm) + centre_norm)) : __builtin_inff();
        bounds[2] = up * scale * root(coded);
        pack_panel(from, rows, D, t.panels + p * D * PANEL);
    }
}

// Scores up to W waiting survivors of query b in fp32 and appends those that beat the threshold.
void rescore(const Screen& s, std::int64_t b, std::int32_t* ids, int n) {
    const Scan& scan = s.scan;
    const std::int64_t D = scan.catalog.D;
    for (int lane = n; lane < W; ++lane) ids[lane] = ids[n - 1];
    const Vec sums = score_rows(s.rows + b * D, [&](int r) { return scan.catalog.items + static_cast<std::int64_t>(ids[r]) * D; },
                                broadcast(0.0f), D);
    const Vec score = max(sums, broadcast(LOWEST));
    const Candidates& c = scan.best;
    const Mask mask = not_less_equal(score, broadcast(c.threshold[b])) & first_lanes(n);
    const std::int64_t at = b * c.stride + c.size[b];
    compress(c.scores + at, mask, score);
    _mm512_storeu_si512(c.ids + at, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(ids)));
    c.size[b] += count(mask);
    if (c.size[b] + PANEL > c.capacity) compact(c, b);
}

// Scores what waits, but for less than a vector unless `all`.
void flush(const Screen& s, std::int64_t b, bool all) {
    std::int32_t* const pending = s.pending + b * STRIDE;
    std::int32_t n = s.waiting[b], from = 0;
    for (; n - from >= W; from += W) rescore(s, b, pending + from, W);
    if (all && from < n) {
        rescore(s, b, pending + from, n - from);
        from = n;
    }
    for (std::int32_t i = from; i < n; ++i) pending[i - from] = pending[i];
    s.waiting[b] = n - from;
}

// The largest integer product that proves that a score does not beat the threshold, for eight queries from b on.
LARES_INLINE void limits(const Screen& s, std::int64_t b, const float* bounds, std::int32_t (&limit)[8], __mmask8 rows) {
    const auto of = [&](const float* values) __attribute__((always_inline)) { return _mm256_maskz_loadu_ps(rows, values + b); };
    const __m256 threshold = of(s.scan.best.threshold), centred = of(s.query.centred), inverse = of(s.query.inverse);
    const __m256 absolute = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    const __m256 sizes = _mm256_add_ps(_mm256_and_ps(threshold, absolute), _mm256_and_ps(centred, absolute));
    __m256 left = _mm256_sub_ps(threshold, centred);
    left = _mm256_fnmadd_ps(sizes, _mm256_set1_ps(4 * ROUNDING), left);
    left = _mm256_fnmadd_ps(of(s.query.norm), _mm256_set1_ps(bounds[1]), left);
    left = _mm256_fnmadd_ps(of(s.query.error), _mm256_set1_ps(bounds[2]), left);
    left = _mm256_mul_ps(_mm256_mul_ps(left, inverse), _mm256_set1_ps(bounds[0]));
    // This arithmetic rounds as well: one unit and four parts in a million less. NaN and what is below all integers convert
    // to INT_MIN, with which everything survives; what is above them becomes more than any product.
    left = _mm256_sub_ps(_mm256_fnmadd_ps(_mm256_and_ps(left, absolute), _mm256_set1_ps(4e-6f), left), _mm256_set1_ps(1.0f));
    const __m256i limits = _mm256_cvttps_epi32(_mm256_floor_ps(_mm256_min_ps(_mm256_set1_ps(2e9f), left)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(limit), limits);
}

template <int R>
LARES_INLINE std::int64_t screen_tile(const Screen& s, std::int64_t b, std::int64_t item, const Mask (&exists)[VECS]) {
    const std::int64_t panel = item / PANEL;
    const std::int8_t* codes = s.codes + panel * s.words * PANEL * 4;
    const std::uint8_t* query = s.query.codes + b * s.words * 4;
    __m512i sums[R][VECS];
    for (int v = 0; v < VECS; ++v) {
        const __m512i start = _mm512_loadu_si512(s.start + panel * PANEL + v * W);
        for (int r = 0; r < R; ++r) sums[r][v] = start;
    }
#pragma GCC unroll 4
    for (std::int64_t w = 0; w < s.words; ++w) {
        __m512i item_codes[VECS];
        for (int v = 0; v < VECS; ++v) item_codes[v] = _mm512_loadu_si512(codes + (w * PANEL + v * W) * 4);
        for (int r = 0; r < R; ++r) {
            std::int32_t word;
            std::memcpy(&word, query + (w * R + r) * 4, 4);
            const __m512i q = _mm512_set1_epi32(word);
            for (int v = 0; v < VECS; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], q, item_codes[v]);
        }
    }
    std::int32_t limit[8];
    limits(s, b, s.bounds + 3 * panel, limit, static_cast<__mmask8>((1u << R) - 1));
    unsigned hits = 0;
    for (int r = 0; r < R; ++r) {
        const __m512i top = _mm512_max_epi32(sums[r][2], _mm512_max_epi32(sums[r][0], sums[r][1]));
        hits |= (_mm512_cmpge_epi32_mask(top, _mm512_set1_epi32(limit[r])) != 0) << r;
    }
    if (__builtin_expect(hits == 0, 1)) return 0;
    std::int32_t lanes[R][PANEL];
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < VECS; ++v) _mm512_storeu_si512(lanes[r] + v * W, sums[r][v]);
    }
    std::int64_t survivors = 0;
    for (; hits; hits &= hits - 1) {
        const int r = __builtin_ctz(hits);
        std::int32_t* const pending = s.pending + (b + r) * STRIDE;
        const std::int32_t before = s.waiting[b + r];
        std::int32_t n = before;
        for (int v = 0; v < VECS; ++v) {
            const __m512i sum = _mm512_loadu_si512(lanes[r] + v * W);
            const Mask mask = _mm512_cmpge_epi32_mask(sum, _mm512_set1_epi32(limit[r])) & exists[v];
            compress_ids(pending + n, mask, static_cast<std::int32_t>(item) + v * W);
            n += count(mask);
        }
        s.waiting[b + r] = n;
        survivors += n - before;
        const std::int64_t D = s.scan.catalog.D;
        for (std::int32_t i = before; i < n; ++i) {
            const float* row = s.scan.catalog.items + static_cast<std::int64_t>(pending[i]) * D;
            for (std::int64_t d = 0; d < D; d += 16) __builtin_prefetch(row + d);
        }
        if (n >= 2 * W) flush(s, b + r, false);
    }
    return survivors;
}

std::int64_t screen(const Screen& s, std::int64_t first, std::int64_t last) {
    const std::int64_t B = s.scan.B;
    const auto rows = static_cast<float>(B);
    float spare = BURST * PANEL * rows;
    std::int64_t item = first;
    for (; item < last && spare >= 0; item += PANEL) {
        const std::int64_t items = last - item < PANEL ? last - item : PANEL;
        Mask exists[VECS];
        for (int v = 0; v < VECS; ++v) exists[v] = first_lanes(items - v * W);
        const char* ahead = reinterpret_cast<const char*>(s.codes + (item / PANEL + 1) * s.words * PANEL * 4);
        const char* const ahead_end = last - item >= 2 * PANEL ? ahead + s.words * PANEL * 4 : ahead;
        const std::int64_t lines_a_tile = s.words * PANEL * 4 / 64 * ROWS / (B + 1) + 1;
        std::int64_t b = 0, survivors = 0;
        for (; b + ROWS <= B; b += ROWS) {
            for (std::int64_t line = 0; line < lines_a_tile && ahead < ahead_end; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            survivors += screen_tile<ROWS>(s, b, item, exists);
        }
        if (b + 4 <= B) survivors += screen_tile<4>(s, b, item, exists), b += 4;
        if (b + 2 <= B) survivors += screen_tile<2>(s, b, item, exists), b += 2;
        if (b < B) survivors += screen_tile<1>(s, b, item, exists);
        spare += SHARE * static_cast<float>(items) * rows - static_cast<float>(survivors);
        if (spare > BURST * PANEL * rows) spare = BURST * PANEL * rows;
    }
    for (std::int64_t b = 0; b < B; ++b) flush(s, b, true);
    return item < last ? item : last;
}

}  // namespace

namespace avx512vnni {
extern const ScreenKernel screen_kernel;
const ScreenKernel screen_kernel{STRIDE, screen, build};
}  // namespace avx512vnni

}  // namespace lares_fast
