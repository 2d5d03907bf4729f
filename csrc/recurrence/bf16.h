// Conversion between fp32 and bf16. Numbers are rounded to the nearest, ties to even, and NaN stays NaN. The functions are
// in an anonymous namespace, because each instruction set compiles its own copy.
#pragma once

#include <cstdint>
#include <cstring>

namespace lares_fast {
namespace {

inline std::uint16_t to_bf16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t nearest = (bits + 0x7FFFu + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40u;
    return static_cast<std::uint16_t>(x == x ? nearest : quiet);
}

inline float from_bf16(std::uint16_t x) {
    const std::uint32_t bits = std::uint32_t{x} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace
}  // namespace lares_fast
