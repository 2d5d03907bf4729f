// Divides one buffer into consecutive slices.
#pragma once

#include <cstdint>

namespace lares_fast {

// Returns one slice after the other. With a null buffer it only counts how many floats the slices need together.
class Carver {
public:
    explicit Carver(float* base) : base_(base) {}
    float* take(std::int64_t floats) {
        float* const slice = base_ ? base_ + used_ : nullptr;
        // Each slice begins at a cache line.
        used_ += (floats + LINE - 1) / LINE * LINE;
        return slice;
    }
    std::int64_t used() const { return used_; }

private:
    // Floats of a cache line.
    static constexpr std::int64_t LINE = 16;
    float* base_;
    std::int64_t used_ = 0;
};

}  // namespace lares_fast
