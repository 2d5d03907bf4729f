// Runs the CUDA kernels on the emulated device. Each op has a source file of its own, so that a change of one kernel compiles
// that kernel only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "catalog/plan.h"
#include "emulator/device.h"
#include "target_rank/target_rank_cuda.h"
#include "topk/topk_cuda.h"

namespace lares_fast {

// The launches of a kernel go to the emulator. The seed sets the order of blocks and threads.
struct EmulatedDevice {
    unsigned seed;
    void clear(void* pointer, std::size_t bytes) { std::memset(pointer, 0, bytes); }
    template <class... Parameters, class... Arguments>
    void launch(void (*kernel)(Parameters...), dim3 grid, int threads, std::int64_t shared_bytes, Arguments... arguments) {
        emulator::run_grid(grid, threads, static_cast<std::size_t>(shared_bytes), seed, [&] { kernel(arguments...); });
    }
};

void topk_emulated(const TopkCuda& call, const TopkPlan& plan, unsigned seed);
void target_rank_emulated(const TargetRankCuda& call, const ScanPlan& plan, unsigned seed);

}  // namespace lares_fast
