// What CMake knows about this build. The values are defined in a file of their own, so that a new version or a new reason
// recompiles only that small file.
#pragma once

namespace lares_fast::build {

extern const char* const VERSION;
extern const char* const COMPILER;
extern const char* const FLAGS;
extern const char* const TYPE;
extern const char* const CPU_ARCH;
extern const bool CUDA_BUILT;
extern const char* const CUDA_ARCHS;  // separated by semicolons
extern const char* const NVCC_VERSION;
extern const char* const CUDA_REASON;

}  // namespace lares_fast::build
