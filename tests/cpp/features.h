// Included before csrc/simd/level.cpp. The test program can hide features of this CPU, and show features that are emulated.
#pragma once

bool shown(const char* feature);
#if defined(AVX512_BY_SIMDE)
#define __builtin_cpu_supports(feature) shown(feature)
#else
#define __builtin_cpu_supports(feature) (shown(feature) && __builtin_cpu_supports(feature))
#endif
