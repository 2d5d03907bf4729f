// Divides a call into blocks of whole sequences. The deepest sequences come first, so that the sequences of a step are
// neighbours.
#pragma once

#include <cstdint>
#include <vector>

#include "recurrence/recurrence.h"

namespace lares_fast {

struct Plan {
    std::vector<Sequence> sequences;
    // They point into `sequences` and into the tape of the call.
    std::vector<Block> blocks;
    // Each token has one row for every layer of every step that is computed.
    std::int64_t tape_rows;
    // The most tokens of a block, and the longest sequence.
    std::int64_t tokens, longest;
};

Plan make_plan(const Recurrence& call);

}  // namespace lares_fast
