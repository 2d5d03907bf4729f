#include "recurrence/recurrence_kernel.h"

#include "recurrence/backward.h"
#include "recurrence/forward.h"

namespace lares_fast {

namespace LARES_LEVEL {
extern const RecurrenceKernel recurrence_kernel;
const RecurrenceKernel recurrence_kernel{workspace, forward, backward};
}  // namespace LARES_LEVEL

}  // namespace lares_fast
