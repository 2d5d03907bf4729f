// Stands for the CUDA objects in a build without them. Only capability() is ever asked: its answer keeps callers from the rest.
#include <stdexcept>

#include "base/build_info.h"
#include "cuda/capability.h"
#include "target_rank/target_rank_cuda.h"
#include "topk/topk_cuda.h"

namespace lares_fast {

std::string capability(int) { return std::string("not built: ") + build::CUDA_REASON; }

Limits device_limits(int device) { throw std::runtime_error(capability(device)); }

std::string topk_cuda(const TopkCuda&, const Limits&, int device, std::uintptr_t) { return capability(device); }

std::string target_rank_cuda(const TargetRankCuda&, const Limits&, int device, std::uintptr_t) { return capability(device); }

}  // namespace lares_fast
