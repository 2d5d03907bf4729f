#pragma once

#include <string>

namespace lares_fast {

// Whether the CUDA objects of this build can run on the current device, in words that start with "ok" when they can.
// Touches the driver, so nothing calls it at import.
std::string capability();

}  // namespace lares_fast
