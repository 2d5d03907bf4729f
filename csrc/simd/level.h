// Which instruction set the kernels use. The choice is made once a process.
#pragma once

#include <string>

namespace lares_fast {

// amx is avx512 with tile registers (csrc/simd/tiles.h).
enum class Level { generic, avx2, avx512, amx };

// Returns the level in force: the one that `use_level` chose, or else the best one of this CPU and this build.
Level level();

// `name` is auto, generic, avx2, avx512 or amx. Throws std::invalid_argument if the CPU or the build lacks the level.
void use_level(const std::string& name);

const char* level_name();

// The instruction sets that kernels are compiled for (csrc/simd/dispatch.h). avx512vnni adds byte products in one instruction
// to avx512, and avx512bf16 adds sums of products of bf16 pairs.
enum class InstructionSet { generic, avx2, avx512, avx512vnni, avx512bf16, amx };

// Whether kernels may use `set` at the level in force.
bool has(InstructionSet set);

}  // namespace lares_fast
