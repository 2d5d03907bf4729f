// The instruction sets of each kind of kernel, and the choice among them at run time. This is the only list: a kernel file
// exports its table of functions once for each set that CMakeLists.txt compiles it for, in a namespace of the set's name.
#pragma once

#include "simd/level.h"

// CMakeLists.txt defines LARES_UP_TO_AVX2, LARES_NO_AVX512_BF16 and LARES_HAS_TILES.
#if defined(__x86_64__) && !defined(LARES_UP_TO_AVX2)
#define LARES_HAS_AVX512
#endif

// Each list calls use(set, ...) for its sets, the best one first.
#if defined(LARES_HAS_AVX512)
#define LARES_FLOAT_SETS(use, ...) use(avx512, __VA_ARGS__) use(avx2, __VA_ARGS__) use(generic, __VA_ARGS__)
#define LARES_BYTE_SETS(use, ...) use(avx512vnni, __VA_ARGS__) use(avx512, __VA_ARGS__) use(avx2, __VA_ARGS__)
#define LARES_BF16_SETS(use, ...) LARES_AMX(use, __VA_ARGS__) LARES_AVX512_BF16(use, __VA_ARGS__) LARES_FLOAT_SETS(use, __VA_ARGS__)
#if defined(LARES_HAS_TILES)
#define LARES_AMX(use, ...) use(amx, __VA_ARGS__)
#else
#define LARES_AMX(use, ...)
#endif
#if defined(LARES_NO_AVX512_BF16)
#define LARES_AVX512_BF16(use, ...)
#else
#define LARES_AVX512_BF16(use, ...) use(avx512bf16, __VA_ARGS__)
#endif
#elif defined(__x86_64__)
#define LARES_FLOAT_SETS(use, ...) use(avx2, __VA_ARGS__) use(generic, __VA_ARGS__)
#define LARES_BYTE_SETS(use, ...) use(avx2, __VA_ARGS__)
#define LARES_BF16_SETS LARES_FLOAT_SETS
#else
#define LARES_FLOAT_SETS(use, ...) use(generic, __VA_ARGS__)
#define LARES_BYTE_SETS(use, ...)
#define LARES_BF16_SETS LARES_FLOAT_SETS
#endif

#define LARES_DECLARE(set, Type, name) namespace set { extern const Type name; }
#define LARES_TRY(set, Type, name) if (has(InstructionSet::set)) return &set::name;

// Defines `const Type* best_<name>()`: the table of the best instruction set in force, or null if there is none.
#define LARES_DISPATCH(SETS, Type, name)  \
    SETS(LARES_DECLARE, Type, name)       \
    const Type* best_##name() {           \
        SETS(LARES_TRY, Type, name)       \
        return nullptr;                   \
    }
