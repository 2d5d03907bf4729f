// Included before csrc/simd/level.cpp: the program may hide what this CPU has, or have it where it is emulated.
#pragma once

bool shown(const char* feature);
#if defined(AVX512_BY_SIMDE)
#define __builtin_cpu_supports(feature) shown(feature)
#else
#define __builtin_cpu_supports(feature) (shown(feature) && __builtin_cpu_supports(feature))
#endif
