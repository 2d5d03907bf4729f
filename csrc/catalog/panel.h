// Panels: PANEL items, transposed to [D][PANEL]. A kernel multiplies one query value with neighbouring items of a panel.
#pragma once

#include "simd/vec.h"

namespace lares_fast {
namespace {

constexpr int VECS = 3;
constexpr int PANEL = VECS * W;

// Copies the first `rows` of PANEL rows [rows, D] to a panel [D][PANEL]. Missing rows become zeros.
inline void pack_panel(const float* from, std::int64_t rows, std::int64_t D, float* panel) {
    // Without columns there is no memory behind the pointers.
    if (D == 0) return;
    if (rows < PANEL) std::memset(panel, 0, sizeof(float) * PANEL * static_cast<std::size_t>(D));
    std::int64_t row = 0;
    for (; row + W <= rows; row += W) {
        const float* first = from + row * D;
        float* to = panel + row;
        std::int64_t d = 0;
        for (; d + 4 <= D; d += 4) {
            Vec columns[4];
            transpose4([=](int r) { return first + r * D + d; }, columns);
            for (int c = 0; c < 4; ++c) store(to + (d + c) * PANEL, columns[c]);
        }
        for (; d < D; ++d) store(to + d * PANEL, gather([=](int r) { return first + r * D + d; }));
    }
    for (; row < rows; ++row) {
        for (std::int64_t d = 0; d < D; ++d) panel[d * PANEL + row] = from[row * D + d];
    }
}

}  // namespace
}  // namespace lares_fast
