// Chooses among the copies of a kernel table that the level sources export.
#pragma once

#include "simd/level.h"

#if defined(__x86_64__)
#define LARES_DISPATCH(Type, name)                               \
    namespace generic { extern const Type name; }                \
    namespace avx2 { extern const Type name; }                   \
    namespace avx512 { extern const Type name; }                 \
    const Type& name() {                                         \
        if (level() >= Level::avx512) return avx512::name;       \
        return level() == Level::avx2 ? avx2::name : generic::name; \
    }
#else
#define LARES_DISPATCH(Type, name)                \
    namespace generic { extern const Type name; } \
    const Type& name() { return generic::name; }
#endif
