// Runs the CUDA kernels on the emulated device and compares them with a plain computation. If a result is wrong, the
// program prints it and exits with 1. The emulator itself exits with 3.
//   cases all     every case
//   cases small   two of the cases, for TSan
//   cases NAME    the case of that name
//   cases counts  how often slow paths are taken, one line a call
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "emulated.h"

namespace lares_fast {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr DeviceLimits HOPPER{132, 227 << 10, 228 << 10};

enum class Values { integers, gaussian, ascending, equal, special, masked };
// Errors of every third query that the host cannot see in device tensors.
enum class Wrong { nothing, offsets, ids };

struct Case {
    std::string name;
    int B, N, D, k;
    Values values = Values::integers;
    bool bias = true;
    int longest = 6;  // longest exclusion list; -1 for no exclusion
    DeviceLimits limits{4, 227 << 10, 228 << 10};
    int misalign = 0;  // floats
    Wrong wrong = Wrong::nothing;
};

// Memory of exactly the requested size, so that a sanitizer finds every access beyond it.
template <class T>
struct Memory {
    explicit Memory(std::size_t n, std::size_t skip = 0) : data(static_cast<T*>(std::malloc((n + skip) * sizeof(T))) + skip), skip(skip) {}
    ~Memory() { std::free(data - skip); }
    Memory(const Memory&) = delete;
    T& operator[](std::size_t i) { return data[i]; }
    T* data;
    std::size_t skip;
};

[[noreturn]] void wrong(const Case& c, bool plain, unsigned seed, const std::string& what) {
    std::printf("WRONG: %s (%s, seed %u): %s\n", c.name.c_str(), plain ? "plain" : "3xTF32", seed, what.c_str());
    std::fflush(stdout);
    std::_Exit(1);
}

struct Data {
    Memory<float> query, items, bias;
    Memory<std::int64_t> offsets, target;
    std::vector<std::int64_t> ids;
    std::vector<std::set<std::int64_t>> gone;
    std::vector<double> truth;      // [B, N]: NaN as -inf
    std::vector<double> tolerance;  // [B, N] for tensor cores
    std::vector<float> plain;       // [B, N]: the same scores in fp32 in the order of D

    Data(const Case& c, unsigned seed)
        : query(std::size_t(c.B) * c.D, c.misalign), items(std::size_t(c.N) * c.D, c.misalign), bias(c.N), offsets(c.B + 1),
          target(c.B), gone(c.B) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        const auto integer = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
        const float specials[] = {INF, -INF, NAN, 3e38f, -3e38f, 1e-39f, 3.4028234e38f};
        for (int i = 0; i < c.B * c.D; ++i) {
            query[i] = c.values == Values::gaussian    ? normal(random)
                       : c.values == Values::ascending ? 1.0f
                                                       : static_cast<float>(integer(-2, 2));
        }
        for (int j = 0; j < c.N; ++j) {
            for (int d = 0; d < c.D; ++d) {
                items[std::size_t(j) * c.D + d] = c.values == Values::gaussian    ? normal(random)
                                                  : c.values == Values::ascending ? static_cast<float>(j % 2000)
                                                  : c.values == Values::equal     ? 1.0f
                                                                                  : static_cast<float>(integer(-2, 2));
            }
            bias[j] = c.values == Values::equal ? 0.0f : static_cast<float>(integer(-3, 3));
            if (c.values == Values::masked && j % 2) bias[j] = -INF;
        }
        if (c.values == Values::special) {
            // At most one special value in a row, so that either every order of summation overflows or none does.
            for (int j = 0; j < c.N; j += 3) items[std::size_t(j) * c.D + integer(0, c.D - 1)] = specials[j % 7];
            for (int b = 0; b < c.B; b += 4) query[std::size_t(b) * c.D + integer(0, c.D - 1)] = specials[b / 4 % 3];
        }
        offsets[0] = 0;
        for (int b = 0; b < c.B; ++b) {
            std::vector<std::int64_t> list(c.longest < 0 || c.N == 0 ? 0 : integer(0, c.longest));
            for (std::int64_t& id : list) id = integer(0, c.N - 1);
            target[b] = c.N ? integer(0, c.N - 1) : 0;
            // If there are several queries, the targets of the last one and of the third one are not items.
            if (c.B > 1 && b == c.B - 1) target[b] = c.N + 1000;
            if (c.B > 3 && b == 2) target[b] = -1 - (std::int64_t{1} << 40);
            if (!list.empty() && b % 3 == 0 && target[b] >= 0 && target[b] < c.N) list.push_back(target[b]);
            if (c.wrong == Wrong::ids && list.empty()) list.push_back(0);
            std::sort(list.begin(), list.end());
            gone[b].insert(list.begin(), list.end());
            ids.insert(ids.end(), list.begin(), list.end());
            offsets[b + 1] = static_cast<std::int64_t>(ids.size());
        }
        for (int b = 0; b < c.B; ++b) {
            for (int j = 0; j < c.N; ++j) {
                double sum = c.bias ? double{bias[j]} : 0, size = std::fabs(sum);
                float plain_sum = c.bias ? bias[j] : 0.0f;
                for (int d = 0; d < c.D; ++d) {
                    const float q = query[std::size_t(b) * c.D + d], x = items[std::size_t(j) * c.D + d];
                    sum += double{q} * x;
                    size += std::fabs(double{q} * x);
                    plain_sum = std::fmaf(q, x, plain_sum);
                }
                plain.push_back(plain_sum == plain_sum ? plain_sum : -INF);
                truth.push_back(std::isfinite(plain_sum) ? sum : double{plain.back()});
                const bool rounds = std::isfinite(plain_sum) && (c.values == Values::gaussian || c.values == Values::special);
                tolerance.push_back(rounds ? 1e-6 * size + 1e-37 : 0);
            }
        }
    }
};

// Whether query `b` of case `c` has a list that is not valid. Queries share their offsets with their neighbours.
bool is_bad(const Case& c, int b) {
    if (c.wrong == Wrong::ids) return b % 3 == 1;
    return c.wrong == Wrong::offsets && (b % 3 == 1 || (b % 3 == 0 && b + 1 < c.B));
}

// Returns the ids that the kernels read, after the errors of `c.wrong` were made in them and in the offsets.
std::vector<std::int64_t> spoiled(const Case& c, Data& data) {
    std::vector<std::int64_t> ids = data.ids;
    const auto size = static_cast<std::int64_t>(ids.size());
    const std::int64_t offsets[] = {-1, size + 1, std::numeric_limits<std::int64_t>::min(), std::int64_t{1} << 60};
    for (int b = 1; b < c.B; b += 3) {
        if (c.wrong == Wrong::offsets) data.offsets[b] = offsets[b / 3 % 4];
        if (c.wrong != Wrong::ids) continue;
        const std::int64_t first = data.offsets[b], last = data.offsets[b + 1] - 1;
        (b % 2 ? ids[last] : ids[first]) = b % 2 ? c.N + 70 : -5;
    }
    return ids;
}

std::string text(double x) { return std::to_string(x); }

void check_topk(const Case& c, bool plain, unsigned seed) {
    Data data(c, 7 * seed + 1);
    const TopkPlan plan = plan_topk(c.B, c.N, c.D, c.k, c.limits);
    Memory<char> workspace(static_cast<std::size_t>(plan.workspace_bytes));
    std::memset(workspace.data, 0xff, static_cast<std::size_t>(plan.workspace_bytes));
    Memory<float> scores(std::size_t(c.B) * c.k);
    Memory<std::int64_t> ids(std::size_t(c.B) * c.k), exclude(data.ids.size());
    const std::vector<std::int64_t> given = spoiled(c, data);
    std::copy(given.begin(), given.end(), exclude.data);
    topk_emulated({data.query.data, data.items.data, c.bias ? data.bias.data : nullptr, c.longest < 0 ? nullptr : data.offsets.data,
                          exclude.data, scores.data, ids.data, workspace.data, c.B, c.N, c.D, c.k,
                          static_cast<std::int64_t>(given.size()), plain}, plan, seed);
    for (int b = 0; b < c.B; ++b) {
        const std::string where = "query " + std::to_string(b);
        if (is_bad(c, b)) {
            for (int n = 0; n < c.k; ++n) {
                if (ids[std::size_t(b) * c.k + n] != -1 || !std::isnan(scores[std::size_t(b) * c.k + n])) {
                    wrong(c, plain, seed, where + " has an answer, but its list is not valid");
                }
            }
            continue;
        }
        const double* const truth = data.truth.data() + std::size_t(b) * c.N;
        const double* const tolerance = data.tolerance.data() + std::size_t(b) * c.N;
        const auto score_of = [&](std::int64_t j) { return plain ? double{data.plain[std::size_t(b) * c.N + j]} : truth[j]; };
        const auto slack = [&](std::int64_t j) { return plain ? 0 : tolerance[j]; };
        std::vector<std::int64_t> order;
        for (int j = 0; j < c.N; ++j) {
            if (!data.gone[b].count(j)) order.push_back(j);
        }
        const int found = static_cast<int>(std::min<std::size_t>(order.size(), c.k));
        std::partial_sort(order.begin(), order.begin() + found, order.end(), [&](std::int64_t x, std::int64_t y) {
            return score_of(x) != score_of(y) ? score_of(x) > score_of(y) : x < y;
        });
        std::set<std::int64_t> seen;
        for (int n = 0; n < c.k; ++n) {
            const std::int64_t id = ids[std::size_t(b) * c.k + n];
            const float score = scores[std::size_t(b) * c.k + n];
            const std::string at = where + ", place " + std::to_string(n) + ": id " + std::to_string(id) + ", score " + text(score);
            if (n >= found) {
                if (id != -1 || score != -INF) wrong(c, plain, seed, at + ", but no item is left");
                continue;
            }
            if (id < 0 || id >= c.N || data.gone[b].count(id) || !seen.insert(id).second) {
                wrong(c, plain, seed, at + " is not an item, is excluded, or occurs twice");
            }
            if (score != score_of(id) && !(std::fabs(score - score_of(id)) <= slack(id))) {
                wrong(c, plain, seed, at + ", and should be " + text(score_of(id)));
            }
            const std::int64_t best = order[n];
            if (id != best && !(score_of(best) - score_of(id) <= slack(best) + slack(id) && slack(id) > 0)) {
                wrong(c, plain, seed, at + ", and should be id " + std::to_string(best) + ", score " + text(score_of(best)));
            }
            if (n > 0) {
                const std::int64_t before = ids[std::size_t(b) * c.k + n - 1];
                const float more = scores[std::size_t(b) * c.k + n - 1];
                if (!(more > score || (more == score && before < id))) {
                    wrong(c, plain, seed, at + " comes after id " + std::to_string(before));
                }
            }
        }
    }
}

void check_rank(const Case& c, bool plain, bool ties_by_id, unsigned seed) {
    if (c.N == 0) return;
    Data data(c, 7 * seed + 1);
    const ScanPlan plan = plan_target_rank(c.B, c.N, c.D, c.limits);
    Memory<std::int64_t> of_all(c.B), of_kept(c.B), exclude(data.ids.size());
    const std::vector<std::int64_t> given = spoiled(c, data);
    std::copy(given.begin(), given.end(), exclude.data);
    target_rank_emulated({data.query.data, data.items.data, c.bias ? data.bias.data : nullptr, data.target.data,
                                 c.longest < 0 ? nullptr : data.offsets.data, exclude.data, of_all.data, of_kept.data, c.B, c.N, c.D,
                                 static_cast<std::int64_t>(given.size()), ties_by_id, plain}, plan, seed);
    for (int b = 0; b < c.B; ++b) {
        const std::int64_t t = data.target[b];
        const bool is_item = t >= 0 && t < c.N;
        std::int64_t least[2] = {}, most[2] = {};
        for (int j = 0; j < c.N; ++j) {
            if (j == t || !is_item) continue;
            const std::size_t at = std::size_t(b) * c.N, other = at + j, own = at + t;
            const double gap = plain ? double{data.plain[other]} - data.plain[own] : data.truth[other] - data.truth[own];
            const double slack = plain ? 0 : data.tolerance[other] + data.tolerance[own];
            // The gap of two equal infinities is NaN.
            const bool tie = !(std::fabs(gap) > 0);
            const bool surely = tie ? slack == 0 && ties_by_id && j < t : gap > slack;
            const bool maybe = tie ? slack > 0 || (ties_by_id && j < t) : gap > -slack;
            const bool kept = !data.gone[b].count(j);
            least[0] += surely, most[0] += maybe;
            least[1] += surely && kept, most[1] += maybe && kept;
        }
        if (!is_item) least[0] = most[0] = c.N;
        if (!is_item || is_bad(c, b)) least[1] = most[1] = c.N;
        const std::int64_t found[2] = {of_all[b], of_kept[b]};
        for (int i = 0; i < 2; ++i) {
            if (found[i] >= least[i] && found[i] <= most[i]) continue;
            wrong(c, plain, seed, "rank of query " + std::to_string(b) + (i ? " without the excluded items: " : ": ") + std::to_string(found[i]) +
                                      ", and should be in " + std::to_string(least[i]) + ".." + std::to_string(most[i]));
        }
    }
}

void check(const Case& c, unsigned seed) {
    for (const bool plain : {false, true}) {
        check_topk(c, plain, seed);
        check_rank(c, plain, true, seed);
        check_rank(c, plain, false, seed);
    }
    std::printf("ok: %s\n", c.name.c_str());
}

const std::vector<Case> SMALL = {
    {"four splits, two chunks", 3, 1030, 40, 40},
    {"many ties", 34, 200, 3, 40, Values::equal},
};

const std::vector<Case> CASES = {
    {"one of all", 1, 1, 1, 1},
    {"no item", 2, 0, 4, 3},
    {"no dimension", 2, 70, 0, 5},
    {"tile - 1", 2, 63, 8, 7},
    {"tile", 2, 64, 8, 64},
    {"tile + 1", 2, 65, 8, 65},
    {"chunk - 1", 3, 100, 31, 10},
    {"chunk", 3, 100, 32, 10},
    {"chunk + 1", 3, 100, 33, 10},
    {"four chunks", 2, 130, 128, 10},
    {"queries read again", 2, 130, 1000, 10, Values::integers, true, 6, {4, 99 << 10, 100 << 10}},
    {"warp - 1", 31, 70, 2, 3},
    {"warp + 1", 33, 70, 2, 3},
    {"block - 1", 127, 70, 2, 3},
    {"block + 1", 129, 70, 2, 3},
    {"no bias, no exclusion", 5, 300, 6, 33, Values::integers, false, -1},
    {"rows that are not aligned", 3, 100, 8, 9, Values::integers, true, 6, HOPPER, 1},
    {"fewer than k left", 4, 20, 2, 20, Values::integers, true, 60},
    {"k of 1", 9, 500, 2, 1},
    {"k of 31", 3, 500, 2, 31},
    {"k of 32", 3, 500, 2, 32},
    {"k of 33", 3, 500, 2, 33},
    {"k of 1024", 2, 1300, 2, 1024},
    {"one split", 4, 1000, 2, 20, Values::integers, true, 6, {1, 60 << 10, 60 << 10}},
    {"many splits", 4, 4000, 2, 20, Values::integers, true, 6, HOPPER},
    {"massed ties", 33, 900, 2, 100, Values::equal},
    {"ascending scores", 3, 1500, 2, 50, Values::ascending},
    {"Gaussian", 6, 700, 50, 100, Values::gaussian},
    {"Gaussian, many splits", 3, 3000, 16, 10, Values::gaussian, true, 20, HOPPER},
    {"infinite, NaN, huge, tiny", 40, 200, 5, 30, Values::special},
    {"half of the items at -inf by their bias", 35, 300, 5, 30, Values::masked},
    {"only -inf is left", 3, 40, 5, 40, Values::masked},
    {"offsets out of range", 40, 300, 5, 30, Values::integers, true, 6, {4, 227 << 10, 228 << 10}, 0, Wrong::offsets},
    {"excluded ids out of range", 40, 300, 5, 30, Values::integers, true, 6, {4, 227 << 10, 228 << 10}, 0, Wrong::ids},
};

// Prints how often one call of each op takes slow paths, for each tile of items and each warp that has queries.
void count(const Case& c) {
    for (const bool ranks : {false, true}) {
        emulator::slow_path("round"), emulator::slow_path("score computed again");
        ranks ? check_rank(c, false, true, 0) : check_topk(c, false, 0);
        const int tiles = (c.B + 31) / 32 * ((c.N + TILE_ITEMS - 1) / TILE_ITEMS);
        std::printf("%s, %s: %.2f rounds, %.2f scores computed again\n", c.name.c_str(), ranks ? "ranks" : "top",
                    double(emulator::slow_path("round")) / tiles, double(emulator::slow_path("score computed again")) / tiles);
    }
}

const std::vector<Case> COUNTED = {
    {"B 1", 1, 20000, 8, 100, Values::gaussian, false, -1},
    {"B 32", 32, 20000, 8, 100, Values::gaussian, false, -1},
    {"B 33", 33, 20000, 8, 100, Values::gaussian, false, -1},
    {"B 129", 129, 20000, 8, 100, Values::gaussian, false, -1},
    {"B 1 masked", 1, 20000, 8, 100, Values::masked, true, -1},
    {"B 33 masked", 33, 20000, 8, 100, Values::masked, true, -1},
};

}  // namespace
}  // namespace lares_fast

int main(int argc, char** argv) {
    using namespace lares_fast;
    const std::string suite = argc > 1 ? argv[1] : "all";
    if (suite == "counts") {
        for (const Case& c : COUNTED) count(c);
        return 0;
    }
    int checked = 0;
    for (const Case& c : suite == "small" ? SMALL : CASES) {
        if (suite != "small" && suite != "all" && suite != c.name) continue;
        for (const unsigned seed : {0u, 1u}) check(c, seed);
        ++checked;
    }
    if (checked == 0) return std::printf("there is no case %s\n", suite.c_str()), 2;
    std::puts("all cases agree");
}
