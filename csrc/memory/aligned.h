// Memory at a cache line's beginning: a vector load that crosses lines costs two.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace lares_fast {

struct FreeScratch {
    void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};
using Scratch = std::unique_ptr<float[], FreeScratch>;

inline Scratch make_scratch(std::int64_t floats) {
    return Scratch(new (std::align_val_t{64}) float[static_cast<std::size_t>(floats)]());
}

}  // namespace lares_fast
