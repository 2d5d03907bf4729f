// Functions that must be part of their caller.
#pragma once

#define LARES_INLINE inline __attribute__((always_inline))
