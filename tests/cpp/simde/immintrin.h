// Stands before the compiler's header of this name: AVX-512 intrinsics by SIMDe, for a CPU that has AVX2 and FMA only.
#pragma once

#include_next <immintrin.h>

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

// Chooses the sources' AVX-512 level; not before SIMDe, which would then take the compiler's own intrinsics.
#define __AVX512F__ 1
