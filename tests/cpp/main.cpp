//   native_tests LEVEL CALLS LARGE CALLERS SEED [BUG]
//   native_tests bytes CALLS SEED
//   native_tests forks FORKS SEED
// The second form makes calls of fuzz.cpp with random bytes, as a fuzzer would. The third form forks beside threads that use the
// pool of memory. The first form is for everything else.
// This program makes CALLS random calls of each op of csrc/, valid and invalid, without Python. LEVEL is generic, avx2, avx512
// (without VNNI), avx512vnni or amx. One call in LARGE has work for several threads. CALLERS threads make such rounds of calls
// at the same time. The last line says how many calls were made. With a planted BUG the program must not reach that line.
// With "bits" as BUG it prints hashes of results instead, and with "level" the level that it chose (LEVEL is then auto).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <random>
#include <thread>

#include "op_test.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size);

namespace {

struct Count {
    std::int64_t valid = 0, invalid = 0;
};

Count round_of_calls(std::int64_t calls, std::int64_t large, std::uint64_t seed) {
    op_test::Random random(seed);
    Count count;
    for (std::int64_t call = 0; call < calls; ++call) {
        for (const op_test::OpTest* op : op_test::OPS) {
            if (random.chance(0.5)) {
                op->invalid(random);
                ++count.invalid;
            } else {
                op->valid(random, large && call % large == 0, random.between(1, 4));
                ++count.valid;
            }
        }
    }
    return count;
}

int calls_without_level(const std::string& kind, std::int64_t calls, std::uint64_t seed) {
    if (kind == "forks") {
        op_test::take_memory_after_forks(calls);
    } else {
        std::mt19937_64 engine(seed);
        for (std::int64_t call = 0; call < calls; ++call) {
            std::vector<std::uint8_t> bytes(engine() % 200);
            for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(engine());
            LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
        }
    }
    std::printf("%s: %lld calls\n", kind.c_str(), static_cast<long long>(calls));
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4 && argc < 6) return std::fprintf(stderr, "usage: native_tests LEVEL CALLS LARGE CALLERS SEED [BUG]\n"), 2;
    const std::int64_t calls = std::atoll(argv[2]), large = std::atoll(argv[3]), callers = argc == 4 ? 0 : std::atoll(argv[4]);
    const auto seed = static_cast<std::uint64_t>(std::atoll(argv[argc == 4 ? 3 : 5]));
    const std::string bug = argc > 6 ? argv[6] : "";
    try {
        const std::string level = argv[1];
        if (argc == 4) return calls_without_level(level, calls, seed);
        const bool vnni = level == "avx512vnni";
        op_test::hide_vnni = !vnni;
        lares_fast::use_level(vnni ? "avx512" : level);
        if (vnni && !lares_fast::has(lares_fast::InstructionSet::avx512vnni)) op_test::fail("this CPU has no avx512vnni");
        if (bug == "level") return std::printf("%s\n", lares_fast::level_name()), 0;
        if (bug == "bits") return op_test::print_bits(calls, seed), 0;
        if (bug == "ties") op_test::ties_to_the_larger_id = true;
        for (const char* output : {"logprob", "d_hidden", "d_items"}) {
            if (bug == output) op_test::too_large = bug;
        }
        if (bug == "read") op_test::read_beyond_the_items();
        if (bug == "race") op_test::write_one_output_twice();
        Count total;
        std::mutex mutex;
        std::vector<std::thread> others;
        std::string failure;
        for (std::int64_t caller = 0; caller < callers; ++caller) {
            others.emplace_back([&, caller] {
                try {
                    const Count count = round_of_calls(calls, large, seed + static_cast<std::uint64_t>(caller));
                    const std::lock_guard<std::mutex> lock(mutex);
                    total.valid += count.valid;
                    total.invalid += count.invalid;
                } catch (const std::exception& error) {
                    const std::lock_guard<std::mutex> lock(mutex);
                    failure = error.what();
                }
            });
        }
        for (std::thread& other : others) other.join();
        if (!failure.empty()) op_test::fail(failure);
        std::printf("level %s, %d ops: %lld valid, %lld invalid\n", argv[1], static_cast<int>(std::size(op_test::OPS)),
                    static_cast<long long>(total.valid), static_cast<long long>(total.invalid));
    } catch (const std::exception& error) {
        return std::fprintf(stderr, "%s\n", error.what()), 1;
    }
    return 0;
}
