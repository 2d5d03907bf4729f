#include "build_info.h"
#include "cuda/capability.h"

namespace lares_fast {

std::string capability() { return std::string("not built: ") + build::CUDA_REASON; }

}  // namespace lares_fast
