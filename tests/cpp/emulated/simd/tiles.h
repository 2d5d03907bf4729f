// The test program finds this file before csrc/simd/tiles.h. It is AMX in plain C++, for every CPU and for sanitizers,
// which cannot see the memory that inline assembly reads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace lares_fast {
namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;

inline bool tiles_there() { return true; }

thread_local std::uint8_t emulated_tiles[8][TILE_ROWS][TILE_BYTES];
thread_local bool emulated_in_use = false;

class Tiles {
public:
    Tiles() {
        std::memset(emulated_tiles, 0, sizeof emulated_tiles);
        emulated_in_use = true;
    }
    ~Tiles() { emulated_in_use = false; }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

template <int TILE>
inline void load_tile(const void* from, std::int64_t stride) {
    if (!emulated_in_use) std::abort();
    const auto* const rows = static_cast<const std::uint8_t*>(from);
    for (int r = 0; r < TILE_ROWS; ++r) std::memcpy(emulated_tiles[TILE][r], rows + r * stride, TILE_BYTES);
}

template <int TILE>
inline void store_tile(void* to, std::int64_t stride) {
    if (!emulated_in_use) std::abort();
    auto* const rows = static_cast<std::uint8_t*>(to);
    for (int r = 0; r < TILE_ROWS; ++r) std::memcpy(rows + r * stride, emulated_tiles[TILE][r], TILE_BYTES);
}

inline float emulated_bf16(const std::uint8_t* from) {
    std::uint16_t half;
    std::memcpy(&half, from, sizeof half);
    const std::uint32_t bits = std::uint32_t{half} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <int SUM, int A, int B>
inline void multiply_tiles() {
    if (!emulated_in_use) std::abort();
    for (int m = 0; m < TILE_ROWS; ++m) {
        float sums[TILE_BYTES / 4];
        std::memcpy(sums, emulated_tiles[SUM][m], sizeof sums);
        for (int k = 0; k < TILE_BYTES / 2; ++k) {
            const float factor = emulated_bf16(emulated_tiles[A][m] + 2 * k);
            for (int n = 0; n < TILE_BYTES / 4; ++n) sums[n] += factor * emulated_bf16(emulated_tiles[B][k / 2] + 4 * n + k % 2 * 2);
        }
        std::memcpy(emulated_tiles[SUM][m], sums, sizeof sums);
    }
}

}  // namespace
}  // namespace lares_fast
