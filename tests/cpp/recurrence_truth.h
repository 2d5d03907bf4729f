// The recurrence in fp64, sequence by sequence and sum by sum.
#pragma once

#include "recurrence_case.h"

namespace op_test {

using Rows = std::vector<double>;  // a matrix row by row, or a vector

struct Truth {
    Rows out, h_grad, pre_grad;
    std::vector<Rows> weight_grads;

    explicit Truth(const Case& c);
};

}  // namespace op_test
