#include "recurrence_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <sstream>

namespace op_test {
namespace {

Tensor numbers(Random& random, std::int64_t n, float mean, float deviation) {
    Random own = random.bulk();
    Tensor values(place(n));
    for (float& value : values) value = mean + deviation * own.normal();
    return values;
}

}  // namespace

Case::Case(Random& random, bool large) {
    const auto one_of = [&](std::vector<std::int64_t> sizes) { return random.one_of<std::int64_t>(sizes); };
    const bool wide = large || random.chance(0.03);
    do {
        const std::int64_t D = 16 * random.between(1, wide ? 16 : 3), I = 16 * random.between(1, wide ? 20 : 3);
        const std::int64_t H = one_of({1, 2, 4, D / 16, D / 8, D});
        shape = {D, D % H ? 2 : H, I, random.between(1, 3), static_cast<Adapter>(random.between(0, 3))};
        B = large ? random.between(1, 40) : random.between(0, 5);
        offsets.resize(1), depth.clear();
        const bool same = random.chance(0.3), longest = large && random.chance(0.3);
        const std::int64_t steps = random.between(1, 4);
        for (std::int64_t b = 0; b < B; ++b) {
            const std::int64_t any = one_of({1, 2, 3, 4, 5, 6, 7, 12, 15, 16, 17, 33, large ? random.between(1, 180) : 9});
            offsets.push_back(offsets.back() + (longest && b == 0 ? random.between(500, 512) : any));
            depth.push_back(same ? steps : random.between(1, steps));
        }
    } while (work() > (large ? 1'000'000 : wide ? 80'000 : 12'000));
    offsets.shrink_to_fit(), depth.shrink_to_fit();
    output = static_cast<Output>(random.between(0, 2));
    eps = random.one_of<float>({1e-12f, 1e-5f});
    const auto threshold = [&] { return static_cast<std::uint32_t>(one_of({0, 6554, 32768})); };
    const auto word = [&] { return static_cast<std::uint32_t>(random.between(0, 0xFFFFFFFF)); };
    dropout = {{word(), word()}, threshold(), threshold(), static_cast<std::uint32_t>(one_of({0, 1, 1, 9}))};
    P = offsets.back();
    for (std::int64_t b = 0; b < B; ++b) {
        rows.push_back(word());
        out_rows += output == Output::last ? 1 : output == Output::steps ? depth[place(b)] : length(b);
        tape_rows += length(b) * depth[place(b)] * shape.layers - (output == Output::tokens ? 0 : length(b) - 1);
    }
    rows.shrink_to_fit();
    const std::int64_t D = shape.D, I = shape.I;
    h = numbers(random, P * D, 0.0f, 2.0f), pre = numbers(random, shape.adapter == Adapter::none ? 0 : P * D, 0.0f, 1.0f);
    out_grad = numbers(random, out_rows * D, 0.0f, 1.0f);
    const auto matrix = [&](std::int64_t out, std::int64_t in) {
        weights.push_back(numbers(random, out * in, 0.0f, 1.0f / std::sqrt(static_cast<float>(in))));
        weights.push_back(numbers(random, out, 0.0f, 0.2f));
    };
    const auto norm = [&] { weights.push_back(numbers(random, D, 1.0f, 0.2f)), weights.push_back(numbers(random, D, 0.0f, 0.2f)); };
    if (shape.adapter == Adapter::linear) weights.push_back(numbers(random, 1, 0.0f, 1.0f));
    if (shape.adapter == Adapter::concat) matrix(D, 2 * D);
    if (shape.adapter != Adapter::none) norm();
    for (std::int64_t i = 0; i < shape.layers; ++i) {
        for (int projection = 0; projection < 4; ++projection) matrix(D, D);
        norm(), matrix(I, D), matrix(D, I), norm();
    }
}

std::string Case::describe() const {
    std::ostringstream text;
    text << "D " << shape.D << ", H " << shape.H << ", inner " << shape.I << ", layers " << shape.layers << ", adapter "
         << static_cast<int>(shape.adapter) << ", output " << static_cast<int>(output) << ", thresholds " << dropout.hidden << ' '
         << dropout.attention << ", level " << lares_fast::level_name() << ", length x depth";
    for (std::int64_t b = 0; b < B; ++b) text << ' ' << length(b) << 'x' << depth[place(b)];
    return text.str();
}

std::int64_t Case::work() const {
    std::int64_t total = 0;
    for (std::int64_t b = 0; b < B; ++b) {
        total += length(b) * depth[place(b)] * shape.layers * (shape.D * (4 * shape.D + 2 * shape.I) + length(b) * shape.D) / 8;
    }
    return total;
}

bool same_bits(const Tensor& a, const Tensor& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

bool same_bits(const Results& a, const Results& b) {
    const std::vector<const Tensor*> x = a.all(), y = b.all();
    return std::equal(x.begin(), x.end(), y.begin(), [](const Tensor* s, const Tensor* t) { return same_bits(*s, *t); });
}

}  // namespace op_test
