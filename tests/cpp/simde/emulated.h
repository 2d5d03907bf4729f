// Included before csrc/simd/level.cpp where AVX-512 is emulated: the program says what this CPU has.
#pragma once

bool emulated(const char* feature);
#define __builtin_cpu_supports emulated
