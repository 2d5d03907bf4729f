// Intel AMX: eight registers of 16 rows of 64 bytes, and products of bf16 in them. The code is inline assembly, because the
// compiler's intrinsics do not say which memory they read and write.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace lares_fast {
namespace {

constexpr int TILE_ROWS = 16, TILE_BYTES = 64;  // TILE_BYTES are the bytes of a row

// Whether this process may use the tiles: the CPU has them, the kernel saves them, and the kernel allows their use. This
// function asks the kernel for that permission.
inline bool tiles_there() {
#if defined(__linux__)
    constexpr unsigned TILE = 1u << 24, BF16 = 1u << 22, OSXSAVE = 1u << 27, STATE = 3u << 17;
    constexpr long REQUEST = 0x1023, DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & OSXSAVE)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (TILE | BF16)) != (TILE | BF16)) return false;
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & STATE) == STATE && syscall(SYS_arch_prctl, REQUEST, DATA) == 0;
#else
    return false;
#endif
}

// Configures all tiles of the calling thread to full size, and releases them at the end of the object's life.
class Tiles {
public:
    Tiles() {
        struct {
            std::uint8_t palette = 1, start = 0, reserved[14] = {};
            std::uint16_t row_bytes[16] = {};
            std::uint8_t rows[16] = {};
        } shapes;
        for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = TILE_BYTES, shapes.rows[tile] = TILE_ROWS;
        asm volatile("ldtilecfg %0" : : "m"(shapes));
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// Loads rows that are `stride` bytes apart.
template <int TILE>
inline __attribute__((always_inline)) void load_tile(const void* from, std::int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(TILE), "r"(from), "r"(stride) : "memory");
}

template <int TILE>
inline __attribute__((always_inline)) void store_tile(void* to, std::int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(TILE), "r"(to), "r"(stride) : "memory");
}

// SUM [16][16] in fp32 += A [16][32] B [32][16] in bf16. B is stored in pairs of rows, [16][16][2].
template <int SUM, int A, int B>
inline __attribute__((always_inline)) void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(A), "i"(B));
}

}  // namespace
}  // namespace lares_fast
