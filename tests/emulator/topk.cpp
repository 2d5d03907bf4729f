#include "emulated.h"
#include "topk/topk_cuda.cuh"

namespace lares_fast {

void topk_emulated(const TopkCuda& call, const TopkPlan& plan, unsigned seed) {
    EmulatedDevice device{seed};
    enqueue_topk(device, call, plan);
}

}  // namespace lares_fast
