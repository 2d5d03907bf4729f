// The forward whose products product.h computes with operands rounded to bf16.
#define LARES_BF16

#include "recurrence/forward.h"

namespace lares_fast {

namespace LARES_LEVEL {
extern const Bf16Kernel bf16_kernel;
const Bf16Kernel bf16_kernel{BF16_PAIRS, forward};
}  // namespace LARES_LEVEL

}  // namespace lares_fast
