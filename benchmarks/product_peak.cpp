// Measures the matrix products of the recurrence alone: D 64, inner size 256, a block of 168 rows. Prints the best of many short runs.
#include "recurrence/product.h"

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <functional>
#include <vector>

extern "C" long fma_flops(long rounds);

using namespace lares_fast;

namespace {

double cpu_seconds() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct Measured {
    const char* name;
    std::function<double()> run;  // returns the number of operations
    double highest = 0;           // FLOP/s
};

}  // namespace

int main() {
    constexpr std::int64_t ROWS = 168, D = 64, INNER = 256, CALLS = 8;
    // Tiles may extend past the last row.
    constexpr std::int64_t HELD = ROWS + 8;
    std::vector<float> memory(2 * HELD * D + HELD * INNER + 3 * D * INNER + 64, 1e-3f);
    Carver carver(memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) / sizeof(float));
    const auto matrix = [&](std::int64_t columns) { return Matrix{carver.take(HELD * columns), HELD}; };
    const Matrix x = matrix(D), y = matrix(D), inner = matrix(INNER);
    float *const weights = carver.take(D * INNER), *const sums = carver.take(D * INNER), *const bias = carver.take(INNER);

    std::vector<Measured> all = {{"peak", [] { return static_cast<double>(fma_flops(100000)); }}};
    const auto share = [&](const char* name, std::int64_t in, std::int64_t out, const auto& call) {
        all.push_back({name, [=] {
            for (std::int64_t i = 0; i < CALLS; ++i) call();
            return 2.0 * static_cast<double>(CALLS * ROWS * in * out);
        }});
    };
    const auto multiply = [=](Matrix from, std::int64_t in, Matrix to, std::int64_t out) {
        product(from, in / COLUMNS, weights, bias, out / COLUMNS, 0, ROWS,
                [to](std::int64_t p, std::int64_t m, int v, Vec sum) { store(to.at(p, m) + v * W, sum); });
    };
    share("product, 64 to 64", D, D, [=] { multiply(x, D, y, D); });
    share("product, 64 to 256", D, INNER, [=] { multiply(x, D, inner, INNER); });
    share("product, 256 to 64", INNER, D, [=] { multiply(inner, INNER, y, D); });
    share("weight gradient, 64 by 64", D, D, [=] { accumulate(x, D / COLUMNS, y, D / COLUMNS, ROWS, sums); });
    share("weight gradient, 256 by 64", D, INNER, [=] { accumulate(inner, INNER / COLUMNS, x, D / COLUMNS, ROWS, sums); });
    share("weight gradient, 64 by 256", D, INNER, [=] { accumulate(x, D / COLUMNS, inner, INNER / COLUMNS, ROWS, sums); });
    // The products take turns, because another program may slow the machine for a while.
    for (int round = 0; round < 2000; ++round) {
        for (Measured& m : all) {
            const double began = cpu_seconds(), done = m.run();
            m.highest = std::max(m.highest, done / (cpu_seconds() - began));
        }
    }
    for (const Measured& m : all) std::printf("%-28s %5.1f %% of peak\n", m.name, 100 * m.highest / all[0].highest);
}
