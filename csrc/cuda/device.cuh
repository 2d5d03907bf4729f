// Operations of the device that CUDA C++ does not offer, in PTX. csrc/emulator/device.h has the same functions for the CPU.
#pragma once

#if defined(LARES_EMULATOR)
#include "emulator/device.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace lares_fast {

__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

// Starts a copy of BYTES to shared memory, or writes zeros unless `real`. `from` must be readable in both cases.
template <int BYTES>
__device__ __forceinline__ void start_copy(float* to, const float* from, bool real) {
    const auto target = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int bytes = real ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(bytes) : "memory");
    } else {
        static_assert(BYTES == 4);
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(from), "r"(bytes) : "memory");
    }
}

// Waits for the copies of the calling thread.
__device__ __forceinline__ void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ std::uint32_t round_to_tf32(float x) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// sums [16][8] += a [16][8] . b [8][8], in the fragments of PTX's mma.m16n8k8.
__device__ __forceinline__ void mma_tf32(float (&sums)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Reads a value that other blocks may raise at the same time.
__device__ __forceinline__ unsigned long long load_relaxed(const unsigned long long* from) {
    unsigned long long value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(from) : "memory");
    return value;
}

// Counts how often a slow path is taken. Only the emulator counts.
__device__ __forceinline__ void count_slow(const char*) {}

}  // namespace lares_fast

#endif
