// Replaces target_rank/target_rank_cuda.cu in a build without CUDA. Callers ask capability() first and then call nothing else.
#include "cuda/capability.h"
#include "target_rank/target_rank_cuda.h"

namespace lares_fast {

std::string target_rank_cuda(const TargetRankCuda&, const DeviceLimits&, int device, std::uintptr_t) { return capability(device); }

}  // namespace lares_fast
