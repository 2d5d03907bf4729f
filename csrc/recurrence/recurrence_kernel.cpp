#include "recurrence/recurrence_kernel.h"

#include "recurrence/backward.h"
#include "recurrence/forward.h"

namespace lares_fast {

namespace LARES_INSTRUCTION_SET {
extern const RecurrenceKernel recurrence_kernel;
const RecurrenceKernel recurrence_kernel{workspace, forward, backward};
}  // namespace LARES_INSTRUCTION_SET

}  // namespace lares_fast
