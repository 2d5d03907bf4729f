// Runs the CUDA kernels on the CPU, for tests. Each CUDA thread is a fiber, and blocks run one after the other. If a kernel
// breaks a rule of CUDA, the emulator reports it and ends the process. csrc/cuda/device.cuh includes this file instead of
// CUDA's headers. README.md says what the emulator cannot find.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
    unsigned x, y, z;
    constexpr explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace lares_fast::emulator {

// The line of the kernel's source that called an operation.
struct SourceLine {
    const char* file;
    int line;
};

dim3 thread_index();
dim3 block_index();
dim3 block_size();
char* shared_memory();
void block_barrier(SourceLine site);
void warp_barrier(unsigned mask, SourceLine site);
// Replaces `value` by the `bytes` that lane `from` brings to the same operation.
void shuffle(unsigned mask, void* value, std::size_t bytes, int from, SourceLine site);
unsigned ballot(unsigned mask, bool vote, SourceLine site);

struct Copy {
    float* to;
    const float* from;
    int floats;
    bool real;
};

// Copies of the calling thread that it has not waited for yet.
void remember(const Copy& copy, SourceLine site);
bool recall(Copy& copy);
void mma_m16n8k8(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], SourceLine site);

// Returns how often threads took the slow path `name` since the last call.
long long slow_path(const char* name);

// Runs `body` once for each thread of the grid. The seed sets the order of blocks and threads; with 0 it is ascending.
void run_grid(dim3 grid, int threads, std::size_t shared_bytes, unsigned seed, const std::function<void()>& body);

}  // namespace lares_fast::emulator

#define threadIdx (lares_fast::emulator::thread_index())
#define blockIdx (lares_fast::emulator::block_index())
#define blockDim (lares_fast::emulator::block_size())
#define LARES_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(LARES_SITE) { lares_fast::emulator::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, LARES_SITE) { lares_fast::emulator::warp_barrier(mask, {file, line}); }
inline unsigned __ballot_sync(unsigned mask, bool vote, LARES_SITE) { return lares_fast::emulator::ballot(mask, vote, {file, line}); }
inline bool __any_sync(unsigned mask, bool vote, LARES_SITE) { return lares_fast::emulator::ballot(mask, vote, {file, line}) != 0; }

template <class T>
T __shfl_sync(unsigned mask, T value, int from, LARES_SITE) {
    lares_fast::emulator::shuffle(mask, &value, sizeof value, from, {file, line});
    return value;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, LARES_SITE) {
    lares_fast::emulator::shuffle(mask, &value, sizeof value, static_cast<int>(threadIdx.x % 32) ^ distance, {file, line});
    return value;
}

// Atomic but unordered, as in CUDA.
template <class T>
T atomicAdd(T* to, T value) {
    return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}

template <class T>
T atomicMax(T* to, T value) {
    T old = __atomic_load_n(to, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(to, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }

inline std::uint32_t __float_as_uint(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

namespace lares_fast {

inline char* shared_memory() { return emulator::shared_memory(); }

// The data arrives as late as possible. A thread that reads before the wait reads NaN.
template <int BYTES>
void start_copy(float* to, const float* from, bool real, LARES_SITE) {
    emulator::remember({to, from, BYTES / 4, real}, {file, line});
    for (int i = 0; i < BYTES / 4; ++i) to[i] = NAN;
}

inline void finish_copies() {
    for (emulator::Copy copy; emulator::recall(copy);) {
        for (int i = 0; i < copy.floats; ++i) copy.to[i] = copy.real ? copy.from[i] : 0.0f;
    }
}

// cvt.rna: rounds to ten bits of fraction, halves away from zero.
inline std::uint32_t round_to_tf32(float x) {
    const std::uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7f800000u) != 0x7f800000u) return (bits + 0x1000u) & ~0x1fffu;
    return bits & 0x7fffffu ? 0x7fffffffu & ~0x1fffu : bits;
}

inline void mma_tf32(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], LARES_SITE) {
    emulator::mma_m16n8k8(sums, a, b, {file, line});
}

inline unsigned long long load_relaxed(const unsigned long long* from) { return __atomic_load_n(from, __ATOMIC_RELAXED); }

void count_slow(const char* name);

}  // namespace lares_fast
