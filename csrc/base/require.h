// Checks of arguments.
#pragma once

#include <stdexcept>

namespace lares_fast {

// Throws std::invalid_argument with `message` unless `holds`.
inline void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

}  // namespace lares_fast
