#include "topk/screen_kernel.h"

#include "catalog/scores.h"
#include "simd/bytes.h"
#include "topk/candidates.h"

namespace lares_fast {
namespace {

static_assert(VECS == 3, "screen_tile takes three registers of items");
constexpr int CODED_PANEL = VECS * CODE_SUMS;
static_assert(CODED_PANEL % PANEL == 0, "a panel of codes is whole panels of floats");
// Survivors are collected until they fill a vector. Before that, one more panel may be added.
constexpr std::int64_t STRIDE = 2 * W + CODED_PANEL;
// A survivor costs about as much time as a hundred screened items. Above this share of survivors fp32 is faster.
constexpr float SHARE = 0.03f;
constexpr float BURST = 0.5f;  // survivors allowed beyond the share, as a part of a panel
constexpr float ROUNDING = 1.2e-7f;
constexpr Coding CODING{CODED_PANEL, GROUP, sizeof(CodeSum), OFFSET, OFFSET - 1, sizeof(CodeSum) == 2};

LARES_INLINE Vec absolute(Vec x) { return max(x, sub(broadcast(0.0f), x)); }

// Rounds to the nearest integer, for |x| below 2^22.
LARES_INLINE Vec rounded(Vec x) {
    const Vec shift = broadcast(0x1.8p23f);
    return sub(add(x, shift), shift);
}

float highest(Vec x, Mask lanes) {
    float of[W], best = 0;
    store(of, x);
    for (; lanes; lanes &= lanes - 1) best = of[__builtin_ctz(lanes)] > best ? of[__builtin_ctz(lanes)] : best;
    return best;
}

// Computes the codes of up to CODED_PANEL items, which are in panels of floats from `panel` on.
void code_panel(const float* panel, std::int64_t rows, std::int64_t D, float norm_limit, float centre_norm, const IndexTables& t,
                std::int8_t* codes, CodeSum* start, float* bounds) {
    const auto each = [&](auto&& body) {
        for (int first = 0; first < rows; first += W) {
            body(panel + first / PANEL * PANEL * D + first % PANEL, first, first_lanes(rows - first));
        }
    };
    float most = 0, scaled = 0, norm = 0;
    bool finite = true;
    each([&](const float* column, int, Mask lanes) {
        Vec size = broadcast(0.0f), scaled_square = size, square = size;
        for (std::int64_t d = 0; d < D; ++d) {
            const Vec item = load(column + d * PANEL);
            const Vec x = mul(sub(item, broadcast(t.centre[d])), broadcast(1.0f / t.scale[d]));
            size = max(absolute(x), size);
            scaled_square = fma(x, x, scaled_square);
            square = fma(item, item, square);
        }
        // The sum of squares shows a NaN, an infinity, and an item that is too large to code.
        finite &= (greater_equal(broadcast(1e30f), add(scaled_square, square)) & lanes) == lanes;
        most = __builtin_fmaxf(most, highest(size, lanes));
        scaled = __builtin_fmaxf(scaled, highest(scaled_square, lanes));
        norm = __builtin_fmaxf(norm, highest(square, lanes));
    });
    float step = most / 127.0f;
    if (CODING.bounded_norms) step = __builtin_fmaxf(step, __builtin_sqrtf(scaled) / norm_limit);
    const bool usable = finite && (step == 0 || step > 1e-15f);
    if (!usable || step == 0) step = 1.0f;
    const float inverse = 1.0f / step;
    float residual = 0, coded = 0;
    each([&](const float* column, int first, Mask lanes) {
        Vec left_square = broadcast(0.0f), code_square = left_square, sum = left_square;
        for (std::int64_t d = 0; d < D && usable; ++d) {
            const Vec x = mul(sub(load(column + d * PANEL), broadcast(t.centre[d])), broadcast(1.0f / t.scale[d]));
            const Vec code = rounded(mul(x, broadcast(inverse)));
            const Vec left = sub(x, mul(code, broadcast(step)));
            left_square = fma(left, left, left_square);
            code_square = fma(code, code, code_square);
            sum = add(sum, code);
            float of[W];
            store(of, code);
            std::int8_t* to = codes + (d / GROUP * CODED_PANEL + first) * GROUP + d % GROUP;
            for (Mask rest = lanes; rest; rest &= rest - 1) {
                const int lane = __builtin_ctz(rest);
                to[lane * GROUP] = static_cast<std::int8_t>(of[lane]);
            }
        }
        residual = __builtin_fmaxf(residual, highest(left_square, lanes));
        coded = __builtin_fmaxf(coded, highest(code_square, lanes));
        float sums[W];
        store(sums, sum);
        for (Mask rest = lanes; rest; rest &= rest - 1) {
            const int lane = __builtin_ctz(rest);
            start[first + lane] = static_cast<CodeSum>(-OFFSET * static_cast<std::int32_t>(sums[lane]));
        }
    });
    // The sums above round, too. Two parts in a hundred thousand cover that for every D that is screened. A panel without a
    // usable step gets an infinite bound, so that all its items survive.
    constexpr float up = 1.00002f;
    bounds[0] = inverse;
    bounds[1] = usable ? up * __builtin_sqrtf(residual) : __builtin_inff();
    bounds[2] = up * step * __builtin_sqrtf(coded);
    bounds[3] = up * static_cast<float>(D + 16) * ROUNDING * (__builtin_sqrtf(norm) + centre_norm);
}

void build(const float* items, std::int64_t N, std::int64_t D, const IndexTables& t, std::int64_t first_panel, std::int64_t last_panel) {
    const std::int64_t bytes = (D + GROUP - 1) / GROUP * GROUP * CODED_PANEL;
    float centre_norm = 0;
    for (std::int64_t d = 0; d < D; ++d) centre_norm += t.centre[d] * t.centre[d];
    centre_norm = __builtin_sqrtf(centre_norm);
    const float norm_limit = code_norm(D);
    for (std::int64_t p = first_panel; p < last_panel; ++p) {
        const std::int64_t first = p * CODED_PANEL;
        const std::int64_t rows = N - first < CODED_PANEL ? N - first : CODED_PANEL;
        float* panel = t.panels + first * D;
        for (std::int64_t row = 0; row < rows; row += PANEL) {
            pack_panel(items + (first + row) * D, rows - row < PANEL ? rows - row : PANEL, D, panel + row * D);
        }
        std::memset(t.codes + p * bytes, 0, static_cast<std::size_t>(bytes));
        std::memset(static_cast<CodeSum*>(t.start) + first, 0, CODED_PANEL * sizeof(CodeSum));
        code_panel(panel, rows, D, norm_limit, centre_norm, t, t.codes + p * bytes, static_cast<CodeSum*>(t.start) + first, t.bounds + 4 * p);
    }
}

// Scores up to W survivors of query b in fp32, and appends the survivors that beat the threshold.
void rescore(const Screen& s, std::int64_t b, std::int32_t* ids, int n) {
    const TopkScan& scan = s.scan;
    const std::int64_t D = scan.catalog.D;
    for (int lane = n; lane < W; ++lane) ids[lane] = ids[n - 1];
    const Vec sums = score_rows(s.rows + b * D, [&](int r) { return scan.catalog.items + static_cast<std::int64_t>(ids[r]) * D; },
                                broadcast(0.0f), D);
    const Vec score = max(sums, broadcast(LOWEST));
    const Candidates& c = scan.best;
    const Mask mask = not_less_equal(score, broadcast(c.threshold[b])) & first_lanes(n);
    const std::int64_t at = b * c.stride + c.size[b];
    compress(c.scores + at, mask, score);
    compress_ids(c.ids + at, mask, ids);
    c.size[b] += count(mask);
    if (c.size[b] + PANEL > c.capacity) compact(c, b);
}

// Scores the waiting survivors in whole vectors. With `all` it also scores the rest.
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

// Computes limit[b]: if a sum of codes is at most the limit, the item's score cannot beat the threshold of query b.
void set_limits(const Screen& s, const float* bounds) {
    const CodedView& q = s.query;
    const std::int64_t B = s.scan.B;
    for (std::int64_t b = 0; b < B; ++b) {
        const float threshold = s.scan.best.threshold[b], centred = q.centred[b];
        const float sizes = __builtin_fabsf(threshold) + __builtin_fabsf(centred);
        float left = threshold - centred - 4 * ROUNDING * sizes;
        left -= q.scaled[b] * bounds[1] + q.error[b] * bounds[2] + q.norm[b] * bounds[3];
        left = left * q.inverse[b] * bounds[0];
        // This arithmetic rounds as well, so the limit is lowered by two units and four parts in a million. With NaN the
        // comparison fails, and all items survive.
        left -= 4e-6f * __builtin_fabsf(left) + 2.0f;
        constexpr float lowest = sizeof(CodeSum) == 2 ? -32768.0f : -2147483648.0f, highest = sizeof(CodeSum) == 2 ? 32767.0f : 2147483520.0f;
        left = left > lowest ? left : lowest;
        left = left < highest ? left : highest;
        const auto limit = static_cast<std::int32_t>(left);
        s.limit[b] = sizeof(CodeSum) == 2 ? static_cast<std::int32_t>((limit & 0xffff) * 0x10001u) : limit;
    }
}

// Adds the items of a panel whose bits are set to the survivors. Returns how many there are.
__attribute__((noinline)) std::int64_t survive(const Screen& s, std::int64_t b, std::int64_t item, std::int64_t last,
                                               const std::uint64_t (&lanes)[VECS]) {
    std::int32_t* const pending = s.pending + b * STRIDE;
    const std::int32_t before = s.waiting[b];
    const std::int64_t D = s.scan.catalog.D;
    std::int32_t n = before;
    for (int v = 0; v < VECS; ++v) {
        for (std::uint64_t rest = lanes[v]; rest; rest &= rest - 1) {
            const std::int64_t id = item + v * CODE_SUMS + __builtin_ctzll(rest);
            if (id >= last) break;
            const float* row = s.scan.catalog.items + id * D;
            for (std::int64_t d = 0; d < D; d += 16) __builtin_prefetch(row + d);
            pending[n++] = static_cast<std::int32_t>(id);
        }
    }
    s.waiting[b] = n;
    if (n >= 2 * W) flush(s, b, false);
    return n - before;
}

template <int R>
LARES_INLINE std::int64_t screen_tile(const Screen& s, std::int64_t words, std::int64_t b, std::int64_t item, std::int64_t last) {
    const std::int8_t* codes = s.index.codes + item * words * GROUP;
    const std::uint8_t* query = s.query.codes + b * words * 4;
    const CodeSum* start = static_cast<const CodeSum*>(s.index.start) + item;
    Sums sums[R][VECS];
    for (int v = 0; v < VECS; ++v) {
        for (int r = 0; r < R; ++r) sums[r][v] = load_sums(start + v * CODE_SUMS);
    }
#pragma GCC unroll 2
    for (std::int64_t w = 0; w < words; ++w) {
        const std::int8_t* panel = codes + w * CODED_PANEL * GROUP;
        const Sums first = load_sums(panel), second = load_sums(panel + CODE_SUMS * GROUP);
        for (int r = 0; r < R; ++r) {
            std::int32_t word;
            std::memcpy(&word, query + (w * R + r) * 4, 4);
            const Sums q = broadcast_word(word);
            sums[r][0] = accumulate(sums[r][0], q, first);
            sums[r][1] = accumulate(sums[r][1], q, second);
            sums[r][2] = accumulate_at(sums[r][2], q, panel + 2 * CODE_SUMS * GROUP);
        }
    }
    std::int64_t survivors = 0;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        const Sums limit = broadcast_word(s.limit[b + r]);
        if (__builtin_expect(above(largest(sums[r][0], largest(sums[r][1], sums[r][2])), limit) == 0, 1)) continue;
        const std::uint64_t lanes[VECS] = {above(sums[r][0], limit), above(sums[r][1], limit), above(sums[r][2], limit)};
        survivors += survive(s, b + r, item, last, lanes);
    }
    return survivors;
}

std::int64_t screen(const Screen& s, std::int64_t first, std::int64_t last) {
    const std::int64_t B = s.scan.B, words = (s.scan.catalog.D + GROUP - 1) / GROUP, bytes = words * GROUP * CODED_PANEL;
    const auto rows = static_cast<float>(B);
    float spare = BURST * CODED_PANEL * rows;
    std::int64_t item = first;
    for (; item < last && spare >= 0; item += CODED_PANEL) {
        set_limits(s, s.index.bounds + 4 * (item / CODED_PANEL));
        const char* ahead = reinterpret_cast<const char*>(s.index.codes + (item / CODED_PANEL + 1) * bytes);
        const char* const ahead_end = last - item >= 2 * CODED_PANEL ? ahead + bytes : ahead;
        const std::int64_t lines_a_tile = bytes / 64 * ROWS / (B + 1) + 1;
        std::int64_t b = 0, survivors = 0;
        for (; b + ROWS <= B; b += ROWS) {
            for (std::int64_t line = 0; line < lines_a_tile && ahead < ahead_end; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            survivors += screen_tile<ROWS>(s, words, b, item, last);
        }
        if (ROWS > 4 && b + 4 <= B) survivors += screen_tile<4>(s, words, b, item, last), b += 4;
        if (b + 2 <= B) survivors += screen_tile<2>(s, words, b, item, last), b += 2;
        if (b < B) survivors += screen_tile<1>(s, words, b, item, last);
        spare += SHARE * CODED_PANEL * rows - static_cast<float>(survivors);
        if (spare > BURST * CODED_PANEL * rows) spare = BURST * CODED_PANEL * rows;
    }
    for (std::int64_t b = 0; b < B; ++b) flush(s, b, true);
    return item < last ? item : last;
}

}  // namespace

namespace LARES_INSTRUCTION_SET {
extern const ScreenKernel screen_kernel;
const ScreenKernel screen_kernel{CODING, STRIDE, screen, build};
}  // namespace LARES_INSTRUCTION_SET

}  // namespace lares_fast
