#include "op_test.h"

#include <algorithm>
#include <cstring>

// For features.h.
bool shown(const char* feature) { return !op_test::hide_vnni || std::strcmp(feature, "avx512vnni") != 0; }

namespace op_test {
namespace {

// Whether a product and a sum are rounded once at the level in force.
bool fused() {
#if defined(__x86_64__)
    return lares_fast::level() != lares_fast::Level::generic;
#else
    return true;
#endif
}

float number(Random& random, const std::string& kind) {
    if (kind == "integers") return static_cast<float>(random.between(-2, 2));
    if (kind == "huge") return random.normal() * 1e19f;
    if (kind == "tiny") return random.normal() * 1e-36f;
    if (kind == "not finite" && random.chance(0.02)) {
        const float infinity = std::numeric_limits<float>::infinity();
        return random.one_of<float>({infinity, -infinity, std::numeric_limits<float>::quiet_NaN()});
    }
    return random.normal();
}

std::vector<float> numbers(Random& random, const std::string& kind, std::int64_t n) {
    Random own = random.bulk();
    std::vector<float> values(static_cast<std::size_t>(n));
    for (float& value : values) value = number(own, kind);
    return values;
}

}  // namespace

bool ties_to_the_larger_id = false;
bool hide_vnni = false;

float Catalog::score(std::int64_t b, std::int64_t item) const {
    float score = with_bias ? bias[static_cast<std::size_t>(item)] : 0.0f;
    const bool fuse = fused();
    const float* q = query.data() + b * D;
    const float* x = items.data() + item * D;
    for (std::int64_t d = 0; d < D; ++d) score = fuse ? std::fma(q[d], x[d], score) : q[d] * x[d] + score;
    // Adding 0 gives -0 and 0 the same bits.
    return score + 0.0f;
}

std::vector<float> Catalog::scores(std::int64_t b) const {
    std::vector<float> scores(static_cast<std::size_t>(N));
    for (std::int64_t item = 0; item < N; ++item) {
        const float own = score(b, item);
        scores[static_cast<std::size_t>(item)] = std::isnan(own) ? -std::numeric_limits<float>::infinity() : own;
    }
    return scores;
}

bool outranks(const std::vector<float>& scores, std::int64_t item, std::int64_t target, bool ties_by_id) {
    const float score = scores[static_cast<std::size_t>(item)], own = scores[static_cast<std::size_t>(target)];
    const bool earlier = ties_to_the_larger_id ? item > target : item < target;
    return item != target && (score > own || (ties_by_id && score == own && earlier));
}

bool Catalog::excluded(std::int64_t b, std::int64_t item) const {
    if (!with_exclude) return false;
    const std::int64_t* ids = exclude.ids.data();
    const std::int64_t* last = ids + exclude.offsets[static_cast<std::size_t>(b) + 1];
    return std::find(ids + exclude.offsets[static_cast<std::size_t>(b)], last, item) != last;
}

std::string Catalog::describe() const {
    std::ostringstream text;
    text << "B " << B << ", N " << N << ", D " << D << ", " << kind << (with_bias ? ", bias" : "")
         << (with_exclude ? ", exclusions" : "") << ", level " << lares_fast::level_name();
    return text.str();
}

Catalog random_rows(Random& random, std::int64_t B, std::int64_t N, std::int64_t D) {
    Catalog c{};
    c.B = B;
    c.N = N;
    c.D = D;
    c.kind = random.one_of<std::string>({"integers", "Gaussian", "not finite", "huge", "tiny", "one item"});
    c.query = numbers(random, c.kind, c.B * c.D);
    c.items = numbers(random, c.kind, c.N * c.D);
    if (c.kind == "one item") {
        const auto width = static_cast<std::size_t>(c.D);
        for (std::size_t i = width; i < c.items.size(); ++i) c.items[i] = c.items[i % width];
    }
    return c;
}

Catalog random_catalog(Random& random, bool large) {
    const std::int64_t B = large ? random.between(1, 9) : random.one_of<std::int64_t>({0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33});
    const std::int64_t N = large ? random.between(65000, 70000)
                : random.one_of<std::int64_t>({1, 2, 11, 12, 13, 23, 24, 25, 47, 48, 49, 95, 96, 97, random.between(1, 700)});
    const std::int64_t D = random.one_of<std::int64_t>({0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, large ? 18 : 64});
    Catalog c = random_rows(random, B, N, D);
    c.bias = numbers(random, c.kind, c.N);
    c.with_bias = random.chance(0.4);
    c.with_exclude = random.chance(0.6);
    c.exclude.offsets.push_back(0);
    for (std::int64_t b = 0; b < c.B; ++b) {
        const std::int64_t n = random.chance(0.1) ? random.between(0, 2 * c.N) : random.between(0, 9);
        for (std::int64_t i = 0; i < std::min<std::int64_t>(n, 1000); ++i) c.exclude.ids.push_back(random.between(0, c.N - 1));
        c.exclude.offsets.push_back(static_cast<std::int64_t>(c.exclude.ids.size()));
    }
    c.exclude.ids.shrink_to_fit();
    c.exclude.offsets.shrink_to_fit();
    return c;
}

std::int64_t bad_id(Random& random, std::int64_t N) {
    using Limits = std::numeric_limits<std::int64_t>;
    const std::int64_t below = -random.between(1, 1000), beyond = N + random.between(0, 1000);
    return random.one_of<std::int64_t>({-1, N, Limits::min(), Limits::max(), below, beyond});
}

void spoil_lists(Random& random, std::int64_t N, Lists& lists) {
    const auto any_of = [&](std::size_t size) {
        return static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(size) - 1));
    };
    switch (random.between(0, 3)) {
        case 0: lists.offsets.front() = random.one_of<std::int64_t>({1, -1, std::numeric_limits<std::int64_t>::min()}); break;
        // Above the last offset, so that the offsets decrease somewhere.
        case 1: lists.offsets[any_of(lists.offsets.size() - 1)] = lists.offsets.back() + random.between(1, 1000); break;
        case 2: lists.offsets.back() = -random.between(1, 1000); break;
        default: lists.ids[any_of(lists.ids.size())] = bad_id(random, N);
    }
}

}  // namespace op_test
