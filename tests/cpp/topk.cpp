#include "topk/topk.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "op_test.h"

namespace op_test {
namespace {

using lares_fast::IndexTables;
using lares_fast::Topk;

constexpr std::int64_t HUGE_SIZE = std::int64_t{1} << 62;

// The memory of an index. Every finite centre, and every scale of powers of two, gives the same results.
struct Index {
    std::vector<float> centre, scale, panels, bounds;
    std::vector<std::int8_t> codes, start;

    Index(const Catalog& c, Random& random, std::int64_t threads) {
        const lares_fast::IndexShape shape = lares_fast::index_shape(c.N, c.D);
        for (std::int64_t d = 0; d < c.D; ++d) {
            const float some = c.items[static_cast<std::size_t>(random.between(0, c.N - 1) * c.D + d)];
            centre.push_back(std::isfinite(some) ? some : 0.0f);
            scale.push_back(std::ldexp(1.0f, static_cast<int>(random.between(-3, 3))));
        }
        panels.resize(static_cast<std::size_t>(shape.panels * c.D * shape.panel));
        codes.resize(static_cast<std::size_t>(shape.coded_panels * shape.code_bytes * shape.coded_panel));
        start.resize(static_cast<std::size_t>(shape.coded_panels * shape.coded_panel * shape.lane_bytes));
        bounds.resize(static_cast<std::size_t>(shape.coded_panels * 4));
        lares_fast::build_index(c.items.data(), c.N, c.D, tables(), threads);
    }

    IndexTables tables() { return {centre.data(), scale.data(), panels.data(), codes.data(), start.data(), bounds.data()}; }
};

struct Output {
    std::vector<float> scores;
    std::vector<std::int64_t> ids;

    explicit Output(std::int64_t size) : scores(static_cast<std::size_t>(size), 7.0f), ids(static_cast<std::size_t>(size), 7) {}
};

Topk call_of(const Catalog& c, std::int64_t k, Output& out) {
    return {c.query.data(), c.items.data(), c.bias_or_null(), c.offsets_or_null(), c.ids_or_null(), out.scores.data(), out.ids.data(),
            c.B, c.N, c.D, k, {}};
}

void compare(const Catalog& c, std::int64_t k, const Output& out, const std::string& how) {
    for (std::int64_t b = 0; b < c.B; ++b) {
        const std::vector<float> scores = c.scores(b);
        std::vector<std::int64_t> order;
        for (std::int64_t item = 0; item < c.N; ++item) {
            if (!c.excluded(b, item)) order.push_back(item);
        }
        const auto at = [&](std::int64_t item) { return scores[static_cast<std::size_t>(item)]; };
        std::sort(order.begin(), order.end(), [&](std::int64_t i, std::int64_t j) {
            if (at(i) != at(j)) return at(i) > at(j);
            return ties_to_the_larger_id ? i > j : i < j;
        });
        for (std::int64_t place = 0; place < k; ++place) {
            const bool real = place < static_cast<std::int64_t>(order.size());
            const std::int64_t id = real ? order[static_cast<std::size_t>(place)] : -1;
            const float score = real ? at(id) : -std::numeric_limits<float>::infinity();
            const auto found = static_cast<std::size_t>(b * k + place);
            if (out.ids[found] == id && out.scores[found] == score) continue;
            std::ostringstream text;
            text.precision(9);
            text << "topk" << how << ", k " << k << ", " << c.describe() << ": query " << b << " has at place " << place << " item "
                 << out.ids[found] << " with " << out.scores[found] << ", and should have item " << id << " with " << score;
            fail(text.str());
        }
    }
}

void valid_topk(Random& random, bool large, std::int64_t threads) {
    const Catalog c = random_catalog(random, large);
    const std::int64_t k = random.chance(0.5) ? random.between(1, 12) : random.between(1, std::min<std::int64_t>(c.N + 3, 2000));
    Output plain(c.B * k), indexed(c.B * k);
    Topk call = call_of(c, k, plain);
    lares_fast::topk_cpu(call, threads);
    compare(c, k, plain, "");
    if (random.chance(0.05)) {
        // No items at all: every place is empty.
        Topk none = call;
        none.N = 0, none.items = nullptr, none.exclude_offsets = nullptr;
        Output empty(c.B * k);
        none.scores = empty.scores.data(), none.ids = empty.ids.data();
        lares_fast::topk_cpu(none, threads);
        if (std::count(empty.ids.begin(), empty.ids.end(), -1) != c.B * k) fail("topk found an item in an empty catalog");
    }
    Index index(c, random, threads);
    call.scores = indexed.scores.data();
    call.ids = indexed.ids.data();
    call.index = index.tables();
    lares_fast::topk_cpu(call, threads);
    compare(c, k, indexed, " with an index");
}

const std::vector<Spoiler<Topk>> TOPK_SPOILERS = {
    {"no query", [](Topk& t) { t.query = nullptr; }},
    {"no items", [](Topk& t) { t.items = nullptr; }},
    {"no scores", [](Topk& t) { t.scores = nullptr; }},
    {"no ids", [](Topk& t) { t.ids = nullptr; }},
    {"no exclude ids", [](Topk& t) { t.exclude_ids = nullptr; }},
    {"B < 0", [](Topk& t) { t.B = -1; }},
    {"N < 0", [](Topk& t) { t.N = -1; }},
    {"D < 0", [](Topk& t) { t.D = -1; }},
    {"B huge", [](Topk& t) { t.B = HUGE_SIZE; }},
    {"N huge", [](Topk& t) { t.N = HUGE_SIZE; }},
    {"N of 2^31", [](Topk& t) { t.N = std::int64_t{1} << 31; }},
    {"D huge", [](Topk& t) { t.D = HUGE_SIZE; }},
    {"the least B", [](Topk& t) { t.B = std::numeric_limits<std::int64_t>::min(); }},
    {"k = 0", [](Topk& t) { t.k = 0; }},
    {"k < 0", [](Topk& t) { t.k = -9; }},
    {"k huge", [](Topk& t) { t.k = HUGE_SIZE; }},
    {"codes, but no other table", [](Topk& t) { t.index.codes = reinterpret_cast<std::int8_t*>(t.ids); }},
    {"codes of a small catalog", [](Topk& t) {
         float* const some = t.scores;
         t.index = {some, some, some, reinterpret_cast<std::int8_t*>(some), some, some};
     }},
};

// A call of at least one query, item, dimension and exclusion, so that each spoiler has an effect.
Catalog full_catalog(Random& random) {
    Catalog c = random_catalog(random, false);
    while (c.B == 0 || c.D == 0 || c.exclude.ids.empty()) c = random_catalog(random, false);
    c.with_exclude = true;
    return c;
}

void invalid_topk(Random& random) {
    const Catalog c = full_catalog(random);
    Output out(c.B * 3);
    Topk call = call_of(c, 3, out);
    Lists lists = c.exclude;
    call.exclude_offsets = lists.offsets.data();
    call.exclude_ids = lists.ids.data();
    if (random.chance(0.3)) {
        spoil_lists(random, c.N, lists);
        must_throw("topk", "bad exclusions", [&] { lares_fast::topk_cpu(call, 2); });
    } else if (random.chance(0.1)) {
        must_throw("topk", "no threads", [&] { lares_fast::topk_cpu(call, random.between(-5, 0)); });
    } else {
        const Spoiler<Topk> spoiler = random.one_of(TOPK_SPOILERS);
        spoiler.spoil(call);
        must_throw("topk", spoiler.name, [&] { lares_fast::topk_cpu(call, 2); });
    }
    for (const float score : out.scores) {
        if (score != 7.0f) fail("topk wrote to the output of an invalid call");
    }
}

void valid_index(Random& random, bool large, std::int64_t threads) {
    const Catalog c = random_catalog(random, large);
    Random again = random;
    Index one(c, random, 1), many(c, again, threads);
    const std::size_t bytes = one.panels.size() * sizeof(float);
    const bool same_panels = bytes == 0 || std::memcmp(one.panels.data(), many.panels.data(), bytes) == 0;
    if (!same_panels || one.codes != many.codes || one.start != many.start) {
        fail("build_index differs by the number of threads: " + c.describe());
    }
}

void invalid_index(Random& random) {
    const Catalog c = full_catalog(random);
    Index index(c, random, 1);
    const IndexTables tables = index.tables();
    IndexTables none = tables;
    none.panels = nullptr;
    using Size = std::int64_t;
    const auto refuse = [](const char* name, const float* items, Size N, Size D, const IndexTables& t, Size threads) {
        must_throw("build_index", name, [&] { lares_fast::build_index(items, N, D, t, threads); });
    };
    switch (random.between(0, 5)) {
        case 0: return refuse("no items", nullptr, c.N, c.D, tables, 1);
        case 1: return refuse("no panels", c.items.data(), c.N, c.D, none, 1);
        case 2: return refuse("N < 0", c.items.data(), -1, c.D, tables, 1);
        case 3: return refuse("D huge", c.items.data(), c.N, HUGE_SIZE, tables, 1);
        case 4: return refuse("N huge", c.items.data(), HUGE_SIZE, c.D, tables, 1);
        default: return refuse("no threads", c.items.data(), c.N, c.D, tables, 0);
    }
}

}  // namespace

void read_beyond_the_items() {
    Random random(1);
    const Catalog c = full_catalog(random);
    Output out(c.B * 3);
    Topk call = call_of(c, 3, out);
    call.N += 1;
    lares_fast::topk_cpu(call, 1);
}

void write_one_output_twice() {
    Random random(1);
    const Catalog c = full_catalog(random);
    Output out(c.B * 3);
    const Topk call = call_of(c, 3, out);
    std::thread other([&] { lares_fast::topk_cpu(call, 1); });
    lares_fast::topk_cpu(call, 1);
    other.join();
}

const OpTest topk{"topk", valid_topk, invalid_topk};
const OpTest build_index{"build_index", valid_index, invalid_index};

}  // namespace op_test
