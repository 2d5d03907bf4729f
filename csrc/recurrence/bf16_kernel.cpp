// The forward pass with products whose operands are rounded to bf16 (see product.h).
#define LARES_BF16

#include "recurrence/forward.h"

namespace lares_fast {
#if defined(LARES_TILES)
namespace {

void forward_in_tiles(const Model& model, const Block& block, const float* h, const float* pre, float* out, float* memory) {
    const Tiles tiles;
    forward(model, block, h, pre, out, memory);
}

}  // namespace
#endif

namespace LARES_INSTRUCTION_SET {
extern const Bf16Kernel bf16_kernel;
#if defined(LARES_TILES)
const Bf16Kernel bf16_kernel{PAIRS, forward_in_tiles};
#else
const Bf16Kernel bf16_kernel{PAIRS, forward};
#endif
}  // namespace LARES_INSTRUCTION_SET

}  // namespace lares_fast
