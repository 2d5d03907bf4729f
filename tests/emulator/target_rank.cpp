#include "emulated.h"
#include "target_rank/target_rank_cuda.cuh"

namespace lares_fast {

void target_rank_emulated(const TargetRankCuda& call, const ScanPlan& plan, unsigned seed) {
    EmulatedDevice device{seed};
    enqueue_target_rank(device, call, plan);
}

}  // namespace lares_fast
