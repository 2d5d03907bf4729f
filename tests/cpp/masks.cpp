#include <algorithm>
#include <string>

#include "op_test.h"
#include "random/philox.h"

namespace op_test {
namespace {

using lares_fast::MaskAddress;

constexpr std::int64_t FIELD = std::int64_t{1} << 32;

std::size_t place(std::int64_t i) { return static_cast<std::size_t>(i); }

// A random address with the rows and positions of some tokens, and the outputs of the three functions, in memory of exactly
// their size.
struct Case {
    std::int64_t P, D, H, L, site;
    std::vector<std::int64_t> rows, positions;
    MaskAddress address;
    std::vector<std::uint8_t> hidden, attention;
    std::vector<double> uniforms;

    explicit Case(Random& random)
        : P(random.between(0, 5)), D(random.one_of<std::int64_t>({0, 1, 31, 32, 33, 63, 64, 65, 200})), H(random.between(0, 3)),
          L(random.one_of<std::int64_t>({0, 1, 3, 4, 5, 15, 16, 17, 50})), site(random.between(0, 6)) {
        for (std::int64_t i = 0; i < P; ++i) {
            rows.push_back(random.between(0, FIELD - 1));
            positions.push_back(random.between(0, FIELD - 1));
        }
        rows.shrink_to_fit(), positions.shrink_to_fit();
        const auto word = [&] { return static_cast<std::uint32_t>(random.between(0, FIELD - 1)); };
        address.key = {word(), word()};
        address.threshold = random.one_of<std::int64_t>({0, 1, 6554, 65535, 65536});
        address.step = random.between(0, 65535);
        address.layer = random.between(0, 65535);
        address.rows = rows.data();
        hidden.assign(place(P * D), 7);
        uniforms.assign(place(P * D), 7.0);
        attention.assign(place(P * H * L * L), 7);
    }
    Case(const Case&) = delete;

    void call(int function) {
        if (function == 0) lares_fast::keep_hidden(address, positions.data(), site, P, D, hidden.data());
        if (function == 1) lares_fast::state_uniforms(address.key, address.rows, positions.data(), P, D, uniforms.data());
        if (function == 2) lares_fast::keep_attention(address, P, H, L, attention.data());
    }

    bool untouched() const {
        const auto all = [](const auto& values, auto value) { return std::count(values.begin(), values.end(), value) == static_cast<std::ptrdiff_t>(values.size()); };
        return all(hidden, 7) && all(attention, 7) && all(uniforms, 7.0);
    }
};

// One word of the generator, computed for its counter alone.
std::uint32_t word(std::uint32_t c0, std::int64_t c1, std::int64_t c2, std::uint32_t c3, lares_fast::Key key, std::int64_t which) {
    const std::uint32_t first[1] = {c0};
    std::uint32_t words[4][1];
    lares_fast::philox(first, static_cast<std::uint32_t>(c1), static_cast<std::uint32_t>(c2), c3, key, words);
    return words[which][0];
}

// Whether the element in column `column` of its group of 16 is kept. Two elements share a word.
bool kept(const MaskAddress& a, std::int64_t c0, std::int64_t c1, std::int64_t row, std::int64_t which, std::int64_t column) {
    const auto time = static_cast<std::uint32_t>(a.step << 16 | a.layer);
    const std::uint32_t both = word(static_cast<std::uint32_t>(c0 | column / 2), c1, row, time, a.key, which);
    return (column % 2 ? both >> 16 : both & 0xFFFF) >= static_cast<std::uint32_t>(a.threshold);
}

void valid(Random& random, bool, std::int64_t) {
    Case c(random);
    for (const int function : {0, 1, 2}) c.call(function);
    const auto check = [](bool right, const char* name) {
        if (!right) fail(std::string(name) + " has a wrong element");
    };
    for (std::int64_t i = 0; i < c.P; ++i) {
        for (std::int64_t d = 0; d < c.D; ++d) {
            const std::int64_t within = d % 64;
            const bool keep = kept(c.address, d / 64 << 3 | c.site << 16, c.positions[place(i)], c.rows[place(i)], within / 16, within % 16);
            check(c.hidden[place(i * c.D + d)] == keep, "keep_hidden");
            const std::uint32_t bits = word(static_cast<std::uint32_t>(d / 4) | lares_fast::SITE_STATE << 16, c.positions[place(i)],
                                            c.rows[place(i)], 0, c.address.key, d % 4);
            check(c.uniforms[place(i * c.D + d)] == (bits + 0.5) / 4294967296.0, "state_uniforms");
        }
        for (std::int64_t j = 0; j < c.H * c.L * c.L; ++j) {
            const std::int64_t head = j / (c.L * c.L), query = j / c.L % c.L, key = j % c.L;
            const bool keep = kept(c.address, head << 3 | std::int64_t{lares_fast::SITE_ATTENTION} << 16, query / 4 | key / 16 << 16,
                                   c.rows[place(i)], query % 4, key % 16);
            check(c.attention[place(i * c.H * c.L * c.L + j)] == keep, "keep_attention");
        }
    }
}

void invalid(Random& random) {
    Case c(random);
    if (c.P == 0 || c.D == 0 || c.H == 0 || c.L == 0) return invalid(random);
    const int function = static_cast<int>(random.between(0, 2));
    constexpr std::int64_t HUGE_SIZE = std::int64_t{1} << 62;
    const auto beyond = [&](std::int64_t limit) { return random.one_of<std::int64_t>({-1, limit, HUGE_SIZE, -HUGE_SIZE}); };
    std::vector<std::int64_t>& fields = function == 2 || random.chance(0.5) ? c.rows : c.positions;
    switch (random.between(0, 4)) {
        case 0: fields[place(random.between(0, c.P - 1))] = beyond(FIELD); break;
        case 1: c.P = random.one_of<std::int64_t>({-1, HUGE_SIZE, -HUGE_SIZE}); break;
        case 2: (function == 2 ? c.L : c.D) = beyond(524289); break;
        case 3:
            if (function == 1) return;
            (random.chance(0.5) ? c.address.step : c.address.layer) = beyond(65536);
            break;
        default:
            if (function == 1) return;
            c.address.threshold = beyond(65537);
    }
    must_throw("a function of masks", "a wrong argument", [&] { c.call(function); });
    if (!c.untouched()) fail("a function of masks wrote to the output of an invalid call");
}

}  // namespace

const OpTest masks{"masks", valid, invalid};

}  // namespace op_test
