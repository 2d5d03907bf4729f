#include <algorithm>
#include <atomic>
#include <memory>

#include "recurrence_truth.h"

namespace op_test {
namespace {

// The ceiling of lares_fast/verify/tolerance.py. It is relative to the larger of the rms and a sixteenth of the largest value.
constexpr double CEILING = 1e-4;

// The sum of squares and the number of the values of some tensors.
struct Size {
    double squares = 0.0, count = 0.0;

    void add(const Rows& values) {
        for (const double value : values) squares += value * value;
        count += static_cast<double>(values.size());
    }
    double rms() const { return count > 0 ? std::sqrt(squares / count) : 0.0; }
};

// Returns what is wrong with a tensor, or "".
std::string fault(const Case& c, const std::string& name, const Tensor& found, const Rows& truth, double floor) {
    Size size;
    size.add(truth);
    double most = 0.0;
    for (const double value : truth) most = std::max(most, std::abs(value));
    const double bound = CEILING * std::max({size.rms(), floor, most / 16});
    for (std::size_t i = 0; i < truth.size(); ++i) {
        if (std::abs(static_cast<double>(found[i]) - truth[i]) <= bound) continue;
        std::ostringstream text;
        text.precision(9);
        text << "recurrence, " << c.describe() << ": " << name << '[' << i << "] is " << found[i] << ", and should be " << truth[i]
             << " within " << bound;
        return text.str();
    }
    return "";
}

// A tenth of the rms of all gradients. It is the floor of the tolerance, because some gradients are zero up to rounding.
double floor_of(const Truth& truth) {
    Size all;
    all.add(truth.h_grad), all.add(truth.pre_grad);
    for (const Rows& grad : truth.weight_grads) all.add(grad);
    return all.rms() / 10;
}

// Whether the exact result changes by a tenth of the ceiling when each number changes by a rounding of fp32. The fp32
// result of such a case says nothing about a kernel.
bool is_ill_conditioned(const Case& c, const Truth& truth) {
    Case moved = c;
    Random random(1);
    const auto move = [&](Tensor& values) {
        for (float& value : values) value *= 1.0f + (random.chance(0.5) ? 1.2e-7f : -1.2e-7f);
    };
    move(moved.h), move(moved.pre);
    for (Tensor& weight : moved.weights) move(weight);
    const Truth other(moved);
    const auto moves = [](const Rows& a, const Rows& b, double floor) {
        Size size;
        size.add(a);
        double most = 0.0, largest = 0.0;
        for (std::size_t i = 0; i < a.size(); ++i) {
            most = std::max(most, std::abs(a[i] - b[i])), largest = std::max(largest, std::abs(a[i]));
        }
        return most > CEILING / 10 * std::max({size.rms(), floor, largest / 16});
    };
    const double floor = floor_of(truth);
    bool any = moves(truth.out, other.out, 0.0) || moves(truth.h_grad, other.h_grad, floor) || moves(truth.pre_grad, other.pre_grad, floor);
    for (std::size_t i = 0; i < truth.weight_grads.size(); ++i) any = any || moves(truth.weight_grads[i], other.weight_grads[i], floor);
    return any;
}

std::string fault(const Case& c, const Results& found, const Truth& truth) {
    const double floor = floor_of(truth);
    std::string text = fault(c, "out", found.out, truth.out, 0.0);
    const auto look = [&](const std::string& name, const Tensor& grad, const Rows& right) {
        if (text.empty()) text = fault(c, name, grad, right, floor);
    };
    look("h_grad", found.h_grad, truth.h_grad);
    look("pre_grad", found.pre_grad, truth.pre_grad);
    for (std::size_t i = 0; i < truth.weight_grads.size(); ++i) {
        look("gradient of weight " + std::to_string(i), found.weight_grads[i], truth.weight_grads[i]);
    }
    return text;
}

// The number of cases that were compared, and the number of cases that were excused as ill-conditioned.
std::atomic<std::int64_t> compared{0}, excused{0};

void compare(const Case& c, const Results& found) {
    const Truth truth(c);
    ++compared;
    const std::string text = fault(c, found, truth);
    if (text.empty()) return;
    if (!is_ill_conditioned(c, truth)) fail(text);
    if (++excused > 2 + compared / 400) fail("too many cases are excused as ill-conditioned; the last: " + text);
}

// Memory is kept from call to call. A NaN must not get from one call to the next one.
void leave_nans_behind(const Case& c) {
    Case spoilt = c;
    std::fill(spoilt.h.begin(), spoilt.h.end(), std::numeric_limits<float>::quiet_NaN());
    for (Tensor& weight : spoilt.weights) std::fill(weight.begin(), weight.end(), std::numeric_limits<float>::quiet_NaN());
    Results results(spoilt);
    Call call(spoilt, results);
    call.forward(2);
    call.backward(2);
}

void valid(Random& random, bool large, std::int64_t threads) {
    const Case c(random, large);
    if (random.chance(0.2)) leave_nans_behind(c);
    Results results(c), again(c), untaped(c);
    Call call(c, results), other(c, again), without_tape(c, untaped);
    call.forward(threads);
    call.backward(threads);
    compare(c, results);

    const auto differ = [&](const std::string& by) { fail("recurrence differs by " + by + ": " + c.describe()); };
    for (const std::int64_t others : {1, 2, 3}) {
        if (others == threads) continue;
        other.forward(others);
        other.backward(others);
        if (!same_bits(results, again)) differ("threads");
    }
    without_tape.call.tape = nullptr;
    without_tape.forward(threads);
    if (!same_bits(results.out, untaped.out)) differ("whether there will be a backward");

    Results rounded(c);
    Call of_bf16(c, rounded);
    of_bf16.call.bf16 = without_tape.call.bf16 = true, of_bf16.call.tape = nullptr;
    of_bf16.forward(threads);
    without_tape.forward(threads % 3 + 1);
    if (!same_bits(rounded.out, untaped.out)) differ("threads in bf16");
    for (const float value : rounded.out) {
        if (!std::isfinite(value)) return fail("recurrence in bf16 is not finite: " + c.describe());
    }
}

constexpr std::int64_t HUGE_SIZE = std::int64_t{1} << 62;

const std::vector<Spoiler<Recurrence>> SPOILERS = {
    {"no h", [](Recurrence& r) { r.h = nullptr; }},
    {"no pre", [](Recurrence& r) { r.pre = nullptr; }},
    {"no offsets", [](Recurrence& r) { r.offsets = nullptr; }},
    {"no depth", [](Recurrence& r) { r.depth = nullptr; }},
    {"no rows", [](Recurrence& r) { r.rows = nullptr, r.dropout.attention = 1; }},
    {"no weights", [](Recurrence& r) { r.weights = nullptr; }},
    {"B < 0", [](Recurrence& r) { r.B = -1; }},
    {"B of 2^31", [](Recurrence& r) { r.B = std::int64_t{1} << 31; }},
    {"the least B", [](Recurrence& r) { r.B = std::numeric_limits<std::int64_t>::min(); }},
    {"D = 0", [](Recurrence& r) { r.shape.D = 0; }},
    {"D < 0", [](Recurrence& r) { r.shape.D = -16; }},
    {"D between multiples of 16", [](Recurrence& r) { r.shape.D += 8; }},
    {"D of 272", [](Recurrence& r) { r.shape.D = 272; }},
    {"D huge", [](Recurrence& r) { r.shape.D = HUGE_SIZE; }},
    {"H = 0", [](Recurrence& r) { r.shape.H = 0; }},
    {"H < 0", [](Recurrence& r) { r.shape.H = -1; }},
    {"H not a divisor of D", [](Recurrence& r) { r.shape.H = r.shape.D - 1; }},
    {"inner size 0", [](Recurrence& r) { r.shape.I = 0; }},
    {"inner size between multiples of 16", [](Recurrence& r) { r.shape.I += 1; }},
    {"inner size huge", [](Recurrence& r) { r.shape.I = HUGE_SIZE; }},
    {"no layers", [](Recurrence& r) { r.shape.layers = 0; }},
    {"layers huge", [](Recurrence& r) { r.shape.layers = HUGE_SIZE; }},
    {"hidden threshold 65536", [](Recurrence& r) { r.dropout.hidden = 65536; }},
    {"bf16 with a tape", [](Recurrence& r) { r.bf16 = true; }},
    {"attention threshold 65536", [](Recurrence& r) { r.dropout.attention = 65536; }},
};

const std::vector<Spoiler<Call>> BACKWARD_SPOILERS = {
    {"no tape", [](Call& c) { c.call.tape = nullptr; }},
    {"no out_grad", [](Call& c) { c.out_grad = nullptr; }},
    {"no h_grad", [](Call& c) { c.h_grad = nullptr; }},
    {"no pre_grad", [](Call& c) { c.pre_grad = nullptr; }},
    {"no weight_grads", [](Call& c) { c.weight_grads = nullptr; }},
    {"no gradient of the last weight", [](Call& c) { c.grads.back() = nullptr; }},
};

void invalid(Random& random) {
    std::unique_ptr<Case> of_any_size;
    // With an adapter, so that `pre` is needed.
    do of_any_size = std::make_unique<Case>(random, false);
    while (of_any_size->B == 0 || of_any_size->shape.adapter == Adapter::none);
    Case& c = *of_any_size;
    Results results(c);
    const Results fresh(c);
    Call call(c, results);
    const bool forward = random.chance(0.5);
    std::int64_t threads = 2;
    std::string what;
    const auto b = place(random.between(0, c.B - 1));
    using Limits = std::numeric_limits<std::int64_t>;
    switch (random.between(0, 6)) {
        case 0:
            what = "no threads";
            threads = random.between(-5, 0);
            break;
        case 1:
            what = "a depth out of range";
            c.depth[b] = random.one_of<std::int64_t>({0, -1, 65536, Limits::min(), Limits::max()});
            break;
        case 2:
            what = "a row out of range";
            c.rows[b] = random.one_of<std::int64_t>({-1, std::int64_t{1} << 32, Limits::min(), Limits::max()});
            break;
        case 3:
            what = "a length out of range";
            c.offsets[b + 1] = c.offsets[b] + random.one_of<std::int64_t>({0, -1, 513, HUGE_SIZE});
            break;
        case 4:
            what = "offsets that begin elsewhere";
            c.offsets[0] = random.one_of<std::int64_t>({1, -1, Limits::min()});
            break;
        default: {
            if (random.chance(0.3)) {
                if (forward) {
                    what = "no out";
                    call.out = nullptr;
                } else {
                    const Spoiler<Call> spoiler = random.one_of(BACKWARD_SPOILERS);
                    what = spoiler.name;
                    spoiler.spoil(call);
                }
                break;
            }
            if (random.chance(0.05)) {
                what = "one weight missing";
                call.weights[place(random.between(0, static_cast<std::int64_t>(call.weights.size()) - 1))] = nullptr;
                break;
            }
            const Spoiler<Recurrence> spoiler = random.one_of(SPOILERS);
            what = spoiler.name;
            spoiler.spoil(call.call);
        }
    }
    const char* const op = forward ? "recurrence_forward" : "recurrence_backward";
    must_throw(op, what.c_str(), [&] { forward ? call.forward(threads) : call.backward(threads); });
    if (!same_bits(results, fresh)) fail("recurrence wrote to the output of an invalid call: " + what);
}

}  // namespace

const OpTest recurrence{"recurrence", valid, invalid};

}  // namespace op_test
