// Replaces topk/topk_cuda.cu in a build without CUDA. Callers ask capability() first and then call nothing else.
#include "cuda/capability.h"
#include "topk/topk_cuda.h"

namespace lares_fast {

std::string topk_cuda(const TopkCuda&, const DeviceLimits&, int device, std::uintptr_t) { return capability(device); }

}  // namespace lares_fast
