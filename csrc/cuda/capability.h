#pragma once

#include <string>

#include "catalog/plan.h"

namespace lares_fast {

// Whether the CUDA objects of this build can run on `device`, the current one (as -1 is), in words that start with "ok" when
// they can. Initialises it and no other. Touches the driver, so nothing calls it at import.
std::string capability(int device);

// Throws std::runtime_error where the driver does not answer.
Limits device_limits(int device);

}  // namespace lares_fast
