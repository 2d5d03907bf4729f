// Replaces cuda/capability.cu in a build without CUDA.
#include <stdexcept>

#include "base/build_info.h"
#include "cuda/capability.h"

namespace lares_fast {

std::string capability(int) { return std::string("not built: ") + build::CUDA_REASON; }

DeviceLimits device_limits(int device) { throw std::runtime_error(capability(device)); }

}  // namespace lares_fast
