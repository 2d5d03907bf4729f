#pragma once

#include <string>

#include "cuda/limits.h"

namespace lares_fast {

// Says whether the CUDA objects of this build can run on `device`; the text starts with "ok" if they can. `device` must be the
// current one, or -1 for the current one. The call initialises this device and no other one. It touches the driver, so no code
// calls it at import.
std::string capability(int device);

// Throws std::runtime_error if the driver does not answer.
DeviceLimits device_limits(int device);

}  // namespace lares_fast
