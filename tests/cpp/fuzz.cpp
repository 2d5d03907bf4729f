// One call of one op for the bytes of a fuzzer. clang links it with libFuzzer, and main.cpp can call it too. Each run chooses the op, the SIMD level among
// those of this CPU, the number of threads, and a valid or an invalid call.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "op_test.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
    static const std::vector<std::string> levels = [] {
        std::vector<std::string> there;
        for (const char* name : {"generic", "avx2", "avx512", "amx"}) {
            try {
                lares_fast::use_level(name);
                there.emplace_back(name);
            } catch (const std::invalid_argument&) {
                // This CPU or this build has no such level.
            }
        }
        return there;
    }();
    try {
        op_test::Random random(bytes, size);
        lares_fast::use_level(random.one_of(levels));
        const op_test::OpTest* const op = op_test::OPS[random.between(0, std::size(op_test::OPS) - 1)];
        if (random.chance(0.5)) {
            op->invalid(random);
        } else {
            op->valid(random, false, random.between(1, 3));
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "wrong result: %s\n", error.what());
        std::abort();
    }
    return 0;
}
