#include "target_rank/target_rank.h"

#include "op_test.h"

namespace op_test {
namespace {

using lares_fast::TargetRank;

struct Case {
    Catalog catalog;
    std::vector<std::int64_t> target, rank, rank_of_all;
    TargetRank call;

    Case(Random& random, bool large) : catalog(random_catalog(random, large)) {
        const Catalog& c = catalog;
        const auto B = static_cast<std::size_t>(c.B);
        for (std::int64_t b = 0; b < c.B; ++b) target.push_back(random.between(0, c.N - 1));
        target.shrink_to_fit();
        rank.assign(B, -7);
        rank_of_all.assign(B, -7);
        call = {c.query.data(), c.items.data(), c.bias_or_null(), target.data(), c.offsets_or_null(), c.ids_or_null(), rank.data(),
                rank_of_all.data(), c.B, c.N, c.D, random.chance(0.5)};
    }
    Case(const Case&) = delete;
};

void valid(Random& random, bool large, std::int64_t threads) {
    Case test(random, large);
    lares_fast::target_rank_cpu(test.call, threads);
    for (std::int64_t b = 0; b < test.catalog.B; ++b) {
        const std::vector<float> scores = test.catalog.scores(b);
        const std::int64_t target = test.target[static_cast<std::size_t>(b)];
        std::int64_t of_all = 0, rank = 0;
        for (std::int64_t item = 0; item < test.catalog.N; ++item) {
            if (!outranks(scores, item, target, test.call.ties_by_id)) continue;
            ++of_all;
            rank += !test.catalog.excluded(b, item);
        }
        const auto at = static_cast<std::size_t>(b);
        if (test.rank[at] == rank && test.rank_of_all[at] == of_all) continue;
        std::ostringstream text;
        text << "target_rank, " << test.catalog.describe() << ": target " << target << " of query " << b << " is at "
             << test.rank_of_all[at] << " of all and " << test.rank[at] << " of the items that are not excluded, and should be at " << of_all << " and " << rank;
        fail(text.str());
    }
}

const std::vector<Spoiler<TargetRank>> SPOILERS = {
    {"no query", [](TargetRank& t) { t.query = nullptr; }},
    {"no items", [](TargetRank& t) { t.items = nullptr; }},
    {"no target", [](TargetRank& t) { t.target = nullptr; }},
    {"no rank", [](TargetRank& t) { t.rank = nullptr; }},
    {"no rank of all", [](TargetRank& t) { t.rank_of_all = nullptr; }},
    {"no exclude ids", [](TargetRank& t) { t.exclude_ids = nullptr; }},
    {"B < 0", [](TargetRank& t) { t.B = -1; }},
    {"N < 0", [](TargetRank& t) { t.N = -1; }},
    {"N = 0", [](TargetRank& t) { t.N = 0; }},
    {"D < 0", [](TargetRank& t) { t.D = -1; }},
    {"B huge", [](TargetRank& t) { t.B = std::int64_t{1} << 62; }},
    {"N huge", [](TargetRank& t) { t.N = std::int64_t{1} << 62; }},
    {"D huge", [](TargetRank& t) { t.D = std::int64_t{1} << 62; }},
};

void invalid(Random& random) {
    Case test(random, false);
    if (test.catalog.B == 0 || test.catalog.D == 0 || test.catalog.exclude.ids.empty()) return invalid(random);
    Lists lists = test.catalog.exclude;
    test.call.exclude_offsets = lists.offsets.data();
    test.call.exclude_ids = lists.ids.data();
    const auto refuse = [&](const char* name, std::int64_t threads) {
        must_throw("target_rank", name, [&] { lares_fast::target_rank_cpu(test.call, threads); });
    };
    switch (random.between(0, 5)) {
        case 0: refuse("no threads", random.between(-5, 0)); break;
        case 1:
            spoil_lists(random, test.catalog.N, lists);
            refuse("bad exclusions", 2);
            break;
        case 2:
            test.target[static_cast<std::size_t>(random.between(0, test.catalog.B - 1))] = bad_id(random, test.catalog.N);
            refuse("a target out of range", 2);
            break;
        default: {
            const Spoiler<TargetRank> spoiler = random.one_of(SPOILERS);
            spoiler.spoil(test.call);
            refuse(spoiler.name, 2);
        }
    }
    for (const std::int64_t rank : test.rank) {
        if (rank != -7) fail("target_rank wrote to the output of an invalid call");
    }
}

}  // namespace

const OpTest target_rank{"target_rank", valid, invalid};

}  // namespace op_test
