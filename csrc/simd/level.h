// Which instruction set the kernels use, chosen once a process.
#pragma once

#include <string>

namespace lares_fast {

// amx is avx512 with tiles (csrc/simd/tiles.h).
enum class Level { generic, avx2, avx512, amx };

// The level in force: what `use_level` chose, else the best that this CPU and this build have.
Level level();

// `name` is auto, generic, avx2, avx512 or amx. Throws std::invalid_argument where the CPU or the build lacks it.
void use_level(const std::string& name);

const char* level_name();

// int8 dot products in one instruction (AVX512_VNNI), at the level in force.
bool has_vnni();

// Sums of products of pairs of bf16 in one instruction (AVX512_BF16), at the level in force.
bool has_bf16();

}  // namespace lares_fast
