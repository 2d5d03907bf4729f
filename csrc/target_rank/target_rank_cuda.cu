#include "cuda/launch.h"
#include "target_rank/target_rank_cuda.cuh"

namespace lares_fast {

std::string target_rank_cuda(const TargetRankCuda& call, const DeviceLimits& limits, int device, std::uintptr_t stream) {
    const ScanPlan plan = plan_target_rank(call.B, call.N, call.D, limits);
    DeviceQueue queue(device, stream);
    enqueue_target_rank(queue, call, plan);
    return queue.error();
}

}  // namespace lares_fast
