#include "cuda/launch.h"
#include "topk/topk_cuda.cuh"

namespace lares_fast {

std::string topk_cuda(const TopkCuda& call, const DeviceLimits& limits, int device, std::uintptr_t stream) {
    const TopkPlan plan = plan_topk(call.B, call.N, call.D, call.k, limits);
    DeviceQueue queue(device, stream);
    enqueue_topk(queue, call, plan);
    return queue.error();
}

}  // namespace lares_fast
