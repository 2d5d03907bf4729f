#include "simd/level.h"

#include <atomic>
#include <stdexcept>

#include "simd/dispatch.h"

#if defined(LARES_HAS_TILES)
#include "simd/tiles.h"
#endif

namespace lares_fast {
namespace {

constexpr int UNSET = -1;
constexpr const char* NAMES[] = {"generic", "avx2", "avx512", "amx"};
std::atomic<int> chosen{UNSET};

#if defined(__x86_64__)
bool runs(Level wanted) {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (wanted == Level::avx2) return avx2;
#if defined(LARES_HAS_AVX512)
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wanted == Level::avx512) return avx512;
#if defined(LARES_HAS_TILES)
    if (wanted == Level::amx) return avx512 && __builtin_cpu_supports("avx512bf16") && tiles_there();
#endif
#endif
    return wanted == Level::generic;
}
#else
bool runs(Level wanted) { return wanted == Level::generic; }
#endif

Level best() {
    for (const Level candidate : {Level::amx, Level::avx512, Level::avx2}) {
        if (runs(candidate)) return candidate;
    }
    return Level::generic;
}

}  // namespace

Level level() {
    int value = chosen.load(std::memory_order_relaxed);
    if (value == UNSET) {
        value = static_cast<int>(best());
        chosen.store(value, std::memory_order_relaxed);
    }
    return static_cast<Level>(value);
}

void use_level(const std::string& name) {
    if (name == "auto") {
        chosen.store(static_cast<int>(best()), std::memory_order_relaxed);
        return;
    }
    for (const Level candidate : {Level::generic, Level::avx2, Level::avx512, Level::amx}) {
        if (name != NAMES[static_cast<int>(candidate)]) continue;
        if (!runs(candidate)) throw std::invalid_argument("this CPU or this build has no " + name);
        chosen.store(static_cast<int>(candidate), std::memory_order_relaxed);
        return;
    }
    throw std::invalid_argument("the SIMD level must be auto, generic, avx2, avx512 or amx, not " + name);
}

const char* level_name() { return NAMES[static_cast<int>(level())]; }

bool has(InstructionSet set) {
    switch (set) {
        case InstructionSet::generic: return true;
        case InstructionSet::avx2: return level() >= Level::avx2;
        case InstructionSet::avx512: return level() >= Level::avx512;
        case InstructionSet::amx: return level() == Level::amx;
#if defined(LARES_HAS_AVX512)
        case InstructionSet::avx512vnni: return level() >= Level::avx512 && __builtin_cpu_supports("avx512vnni");
        case InstructionSet::avx512bf16: return level() >= Level::avx512 && __builtin_cpu_supports("avx512bf16");
#endif
        default: return false;
    }
}

}  // namespace lares_fast
