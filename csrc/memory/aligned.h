// Memory that begins at a cache line: a vector load that crosses two cache lines costs twice as much.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace lares_fast {

constexpr std::size_t CACHE_LINE = 64;

struct FreeAligned {
    void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{CACHE_LINE}); }
};
using AlignedFloats = std::unique_ptr<float[], FreeAligned>;

// Returns `floats` zeros.
inline AlignedFloats aligned_floats(std::int64_t floats) {
    return AlignedFloats(new (std::align_val_t{CACHE_LINE}) float[static_cast<std::size_t>(floats)]());
}

}  // namespace lares_fast
