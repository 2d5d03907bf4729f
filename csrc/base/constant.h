// A number as a type, for generic lambdas that need it at compile time.
#pragma once

namespace lares_fast {

template <int N>
struct Constant {
    static constexpr int value = N;
};

}  // namespace lares_fast
