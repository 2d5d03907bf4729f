// The cut of a call into blocks: whole sequences, deepest first, so that those of a step stand together.
#pragma once

#include <cstdint>
#include <vector>

#include "recurrence/recurrence.h"

namespace lares_fast {

struct Plan {
    struct Piece {
        std::int64_t first, count;  // of `sequences`
        std::int64_t tokens, longest;
        std::int64_t tape_row;
    };
    std::vector<Sequence> sequences;
    std::vector<Piece> pieces;
    std::int64_t tape_rows;  // a row a token, layer and step that is computed
    std::int64_t tokens, longest;  // the most of a piece
};

Plan make_plan(const Recurrence& call);

}  // namespace lares_fast
