#include "linear_cross_entropy/linear_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "op_test.h"

namespace op_test {

std::string too_large;

namespace {

using lares_fast::Softmax;
using lares_fast::TargetLogprob;
using lares_fast::TargetLogprobBackward;

std::size_t place(std::int64_t i) { return static_cast<std::size_t>(i); }

constexpr double NaN = std::numeric_limits<double>::quiet_NaN(), INFINITE = std::numeric_limits<double>::infinity();

// Results are compared with fp64. The fp64 computation starts from scores with the bits of topk. u = 2^-24 is half a unit
// in the last place of fp32. The bounds are:
// - SUM is for the sum of a row's terms, and for 1 - p, where p is the target's probability. A lane of fp32 has 192 additions.
//   A term e^-x has an error of 3 u x, with x <= 87 where it counts. Together that is 290 u, which is rounded up.
// - LOGPROB is for logprob. Its error is the bound above times 1 - p, plus u for itself.
// - GRADIENT is for a sum of the gradients. It covers the error of p, and an addition for each item of a tile, row of a block,
//   tile and part. It is 1e-4 (the ceiling of lares_fast/verify/tolerance.py) of the sum of the absolute terms.
constexpr double SUM = 512 * 0x1p-24, LOGPROB = 0x1p-23, GRADIENT = 1e-4;
// The bound in fp64 of lse as one number, which may be as large as a score times scale.
constexpr double WIDE = 0x1p-50;
// A term of the backward pass has an error of 2^-125, and its products have an error of 2^-149. Both are multiplied by a factor
// that is 1, or more if the fp32 number next to log-sum-exp is above it. At most it is the number of items, which is below 2^14.
constexpr double TERM = 0x1p-111, PRODUCT = 0x1p-135;

struct Case {
    Catalog rows;
    std::vector<std::int64_t> target;
    std::vector<float> grad;
    Softmax softmax;

    explicit Case(Random& random, bool large) {
        const auto one_of = [&](std::vector<std::int64_t> sizes) { return random.one_of<std::int64_t>(sizes); };
        const bool tall = random.chance(0.3);
        std::int64_t M, N, D;
        do {
            M = one_of({0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 191, 192, 193, 1024, 1025});
            N = one_of({1, 2, 3, 11, 12, 13, 23, 24, 25, 47, 48, 49, 95, 96, 97, 1023, 1024, 1025, 1600, random.between(1, 700)});
            D = one_of({0, 1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 65});
            // More rows than share a buffer of the backward pass, or more items than the largest number of parts has.
            if (large && tall) M = random.between(4095, 4100);
            if (large && !tall) N = random.between(8100, 8300);
        } while (M * N * (D + 8) > (large ? 1'000'000 : 100'000));
        rows = random_rows(random, M, N, D);
        const bool skip_pad = N > 1 && random.chance(0.5);
        const double scale = one_of({0, 1}) ? 1.0 : random.one_of<double>({1 / 0.07, 1e-3, 1e3, 0x1p-100, 0x1p100});
        target.reserve(place(M));
        grad.reserve(place(M));
        const std::int64_t same = random.between(skip_pad, N - 1);
        const bool one_target = random.chance(0.1);
        for (std::int64_t m = 0; m < M; ++m) {
            target.push_back(one_target ? same : random.between(skip_pad, N - 1));
            grad.push_back(random.chance(0.1) ? 0.0f : random.normal());
        }
        softmax = {rows.query.data(), rows.items.data(), target.data(), M, N, D, scale, skip_pad};
    }
    Case(const Case&) = delete;

    std::string describe() const {
        std::ostringstream text;
        text << rows.describe() << ", scale " << softmax.scale << (softmax.skip_pad ? ", without PAD" : "");
        return text.str();
    }
};

// All NaNs count as equal. The sign of a NaN depends on the order of the operands, which the compiler chooses.
template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    const auto same = [](T x, T y) { return std::memcmp(&x, &y, sizeof(T)) == 0 || (std::isnan(x) && std::isnan(y)); };
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), same);
}

// The outputs of both calls, in memory of exactly their size.
struct Output {
    std::vector<float> logprob;
    std::vector<double> lse;  // [M, 2]
    std::vector<std::int64_t> rank;
    std::vector<float> d_hidden, d_items;

    explicit Output(const Softmax& s)
        : logprob(place(s.M), 7.0f), lse(place(2 * s.M), 7.0), rank(place(s.M), 7),
          d_hidden(place(s.M * s.D), 7.0f), d_items(place(s.N * s.D), 7.0f) {}

    bool operator==(const Output& other) const {
        return same_bits(logprob, other.logprob) && same_bits(lse, other.lse) && rank == other.rank &&
               same_bits(d_hidden, other.d_hidden) && same_bits(d_items, other.d_items);
    }

    TargetLogprob forward(const Softmax& s, bool ties_by_id) { return {s, logprob.data(), lse.data(), rank.data(), ties_by_id}; }
    TargetLogprobBackward backward(const Softmax& s, const float* grad) {
        return {s, grad, lse.data(), d_hidden.data(), d_items.data()};
    }
};

// One row of the softmax in fp64.
struct Row {
    std::vector<double> p;  // [N]
    double logprob, lse;

    Row(const Case& test, std::int64_t m) : p(place(test.softmax.N)) {
        const Softmax& s = test.softmax;
        const std::int64_t target = s.target[m];
        double top = -INFINITE, top_other = -INFINITE;
        for (std::int64_t j = s.skip_pad; j < s.N; ++j) {
            const double score = static_cast<double>(test.rows.score(m, j));
            p[place(j)] = score;
            top = std::isnan(score) || std::isnan(top) ? NaN : std::max(top, score);
            if (j != target) top_other = std::max(top_other, score);
        }
        const double own = p[place(target)];
        double all = 0.0, others = 0.0;
        for (std::int64_t j = s.skip_pad; j < s.N; ++j) {
            const double score = p[place(j)];
            all += std::exp(s.scale * (score - top));
            if (j != target) others += std::exp(s.scale * (score - top_other));
        }
        lse = std::isfinite(top) ? s.scale * top + std::log(all) : top;
        // log (others / own). 1 - p of the target may vanish beside 1, and the sums may vanish beside the scores.
        const double odds = std::isfinite(top_other) ? s.scale * (top_other - own) + std::log(others) : -INFINITE;
        logprob = odds > 0 ? -odds - std::log1p(std::exp(-odds)) : -std::log1p(std::exp(odds));
        if (!std::isfinite(own) || !std::isfinite(lse)) logprob = own - lse;
        for (std::int64_t j = s.skip_pad; j < s.N; ++j) p[place(j)] = std::exp(s.scale * (p[place(j)] - top)) / all;
    }

    double rounding() const { return WIDE * std::abs(lse); }
};

// A sum in fp64 and a bound of its error.
struct Sum {
    double value = 0.0, bound = 0.0;

    void add(double factor, double x, double error) {
        value += factor * x;
        bound += (GRADIENT * std::abs(factor) + error) * std::abs(x);
    }
};

// Whether the terms of a sum, which are known up to the bound, are far from the end of fp32.
bool fits(const Sum& sum) { return sum.bound < 1e-6 * static_cast<double>(std::numeric_limits<float>::max()); }

void expect(const Case& test, const char* name, std::int64_t row, std::int64_t column, double found, double wanted,
            double bound) {
    if (too_large == name) wanted *= 1.001;
    if (std::isnan(wanted) ? std::isnan(found) : found == wanted || std::abs(found - wanted) <= bound) return;
    std::ostringstream text;
    text.precision(9);
    text << "linear_cross_entropy, " << test.describe() << ": " << name << '[' << row << ", " << column << "] is " << found
         << ", and should be " << wanted << " within " << bound;
    fail(text.str());
}

void compare_row(const Case& test, std::int64_t m, const Row& row, const Output& out, bool ties_by_id) {
    const auto at = place(m);
    const bool beyond = std::abs(row.logprob) > static_cast<double>(std::numeric_limits<float>::max());
    const double logprob = beyond ? -INFINITE : row.logprob, loss = std::abs(logprob);
    const double bound = SUM * std::min(1.0, loss) + LOGPROB * loss + 1e-30;
    expect(test, "logprob", m, 0, static_cast<double>(out.logprob[at]), logprob, bound);
    expect(test, "lse", m, 0, test.softmax.scale * out.lse[2 * at] + out.lse[2 * at + 1], row.lse, SUM + row.rounding());
    const std::vector<float> scores = test.rows.scores(m);
    std::int64_t rank = 0;
    for (std::int64_t j = test.softmax.skip_pad; j < test.softmax.N; ++j) {
        rank += outranks(scores, j, test.target[at], ties_by_id);
    }
    expect(test, "rank", m, 0, static_cast<double>(out.rank[at]), static_cast<double>(rank), 0.0);
}

void compare_gradients(const Case& test, const std::vector<Row>& all_rows, const Output& out) {
    const Softmax& s = test.softmax;
    std::vector<Sum> d_items(out.d_items.size());
    bool finite = true, small = true;
    for (std::int64_t m = 0; m < s.M; ++m) {
        const Row& row = all_rows[place(m)];
        const bool row_finite = std::isfinite(row.lse);
        finite &= row_finite;
        std::vector<Sum> d_hidden(place(s.D));
        const double upstream = s.scale * static_cast<double>(test.grad[place(m)]), size = std::abs(upstream);
        for (std::int64_t j = s.skip_pad; j < s.N && row_finite; ++j) {
            const bool own = j == s.target[m];
            const double factor = upstream * (own ? -std::expm1(row.logprob) : -row.p[place(j)]);
            const double error = size * TERM;
            for (std::int64_t d = 0; d < s.D; ++d) {
                d_hidden[place(d)].add(factor, static_cast<double>(s.items[j * s.D + d]), error);
                d_items[place(j * s.D + d)].add(factor, static_cast<double>(s.hidden[m * s.D + d]), error);
            }
        }
        // A row that leaves fp32 when its gradient is multiplied makes d_items infinite or NaN.
        for (std::int64_t d = 0; d < s.D; ++d) small &= fits({0.0, GRADIENT * size * std::abs(static_cast<double>(s.hidden[m * s.D + d]))});
        const double least = PRODUCT * (1.0 + size * static_cast<double>(s.N));
        for (std::int64_t d = 0; d < s.D; ++d) {
            const Sum sum = row_finite ? d_hidden[place(d)] : Sum{NaN, 0.0};
            if (row_finite && !fits(sum)) continue;
            const auto found = static_cast<double>(out.d_hidden[place(m * s.D + d)]);
            expect(test, "d_hidden", m, d, found, sum.value, sum.bound + least);
        }
    }
    const double least = PRODUCT * static_cast<double>(s.M);
    for (std::int64_t j = 0; j < s.N; ++j) {
        for (std::int64_t d = 0; d < s.D; ++d) {
            const bool none = j < s.skip_pad;
            const auto at = place(j * s.D + d);
            const Sum sum = finite || none ? d_items[at] : Sum{NaN, 0.0};
            if (finite && !none && !(small && fits(sum))) continue;
            expect(test, "d_items", j, d, static_cast<double>(out.d_items[at]), sum.value, none ? 0.0 : sum.bound + least);
        }
    }
}

void valid(Random& random, bool large, std::int64_t threads) {
    const Case test(random, large);
    const Softmax& s = test.softmax;
    const bool ties_by_id = random.chance(0.5);
    Output out(s), again(s);
    lares_fast::target_logprob_cpu(out.forward(s, ties_by_id), threads);
    lares_fast::target_logprob_backward_cpu(out.backward(s, test.grad.data()), threads);

    std::vector<Row> rows;
    for (std::int64_t m = 0; m < s.M; ++m) {
        rows.emplace_back(test, m);
        compare_row(test, m, rows.back(), out, ties_by_id);
    }
    compare_gradients(test, rows, out);

    const auto differ = [&](const std::string& by) { fail("linear_cross_entropy differs by " + by + ": " + test.describe()); };
    const std::int64_t others = threads == 1 ? 3 : 1;
    lares_fast::target_logprob_cpu(again.forward(s, ties_by_id), others);
    lares_fast::target_logprob_backward_cpu(again.backward(s, test.grad.data()), others);
    if (!(out == again)) differ("threads");

    Output part(s);
    TargetLogprob forward = part.forward(s, ties_by_id);
    forward.rank = nullptr;
    lares_fast::target_logprob_cpu(forward, threads);
    if (!same_bits(out.logprob, part.logprob) || !same_bits(out.lse, part.lse)) differ("whether ranks are asked for");
    TargetLogprobBackward backward = part.backward(s, test.grad.data());
    const bool of_hidden = random.chance(0.5);
    (of_hidden ? backward.d_items : backward.d_hidden) = nullptr;
    lares_fast::target_logprob_backward_cpu(backward, threads);
    const bool same = of_hidden ? same_bits(out.d_hidden, part.d_hidden) : same_bits(out.d_items, part.d_items);
    if (!same) differ("which gradients are asked for");
}

const std::vector<Spoiler<Softmax>> SOFTMAX_SPOILERS = {
    {"no hidden", [](Softmax& s) { s.hidden = nullptr; }},
    {"no items", [](Softmax& s) { s.items = nullptr; }},
    {"no target", [](Softmax& s) { s.target = nullptr; }},
    {"M < 0", [](Softmax& s) { s.M = -1; }},
    {"the least M", [](Softmax& s) { s.M = std::numeric_limits<std::int64_t>::min(); }},
    {"M huge", [](Softmax& s) { s.M = std::int64_t{1} << 62; }},
    {"N < 0", [](Softmax& s) { s.N = -1; }},
    {"N = 0", [](Softmax& s) { s.N = 0; }},
    {"N of 2^31", [](Softmax& s) { s.N = std::int64_t{1} << 31; }},
    {"N huge", [](Softmax& s) { s.N = std::int64_t{1} << 62; }},
    {"D < 0", [](Softmax& s) { s.D = -1; }},
    {"D huge", [](Softmax& s) { s.D = std::int64_t{1} << 62; }},
    {"scale 0", [](Softmax& s) { s.scale = 0.0; }},
    {"scale < 0", [](Softmax& s) { s.scale = -1.0; }},
    {"scale NaN", [](Softmax& s) { s.scale = NaN; }},
    {"scale infinite", [](Softmax& s) { s.scale = INFINITE; }},
    {"scale 2^101", [](Softmax& s) { s.scale = 0x1p101; }},
    {"scale 2^-101", [](Softmax& s) { s.scale = 0x1p-101; }},
    {"nothing but PAD", [](Softmax& s) { s.skip_pad = true, s.N = 1; }},
};

void invalid(Random& random) {
    Case test(random, false);
    Softmax s = test.softmax;
    if (s.M == 0 || s.D == 0) return invalid(random);
    Output out(s), fresh(s);
    TargetLogprob forward = out.forward(s, true);
    TargetLogprobBackward backward = out.backward(s, test.grad.data());
    const bool of_values = random.chance(0.5);
    std::int64_t threads = 2;
    std::string what;
    switch (random.between(0, 5)) {
        case 0:
            what = "no threads";
            threads = random.between(-5, 0);
            break;
        case 1:
            what = "a target out of range";
            test.target[place(random.between(0, s.M - 1))] = s.skip_pad && random.chance(0.3) ? 0 : bad_id(random, s.N);
            break;
        case 2:
            what = of_values ? "no output" : "no gradient or no lse";
            if (random.chance(0.5)) {
                forward.logprob = nullptr;
                backward.grad = nullptr;
            } else {
                forward.lse = nullptr;
                backward.lse = nullptr;
            }
            break;
        default: {
            const Spoiler<Softmax> spoiler = random.one_of(SOFTMAX_SPOILERS);
            what = spoiler.name;
            spoiler.spoil(s);
            forward.softmax = backward.softmax = s;
        }
    }
    if (of_values) {
        must_throw("target_logprob", what.c_str(), [&] { lares_fast::target_logprob_cpu(forward, threads); });
    } else {
        must_throw("target_logprob_backward", what.c_str(), [&] { lares_fast::target_logprob_backward_cpu(backward, threads); });
    }
    if (!(out == fresh)) fail("linear_cross_entropy wrote to the output of an invalid call: " + what);
}

}  // namespace

const OpTest linear_cross_entropy{"linear_cross_entropy", valid, invalid};

}  // namespace op_test
