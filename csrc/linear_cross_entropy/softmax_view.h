// A call in the form that the kernels read: checked, without the PAD row if that is left out, and divided into parts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "catalog/checks.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace lares_fast {

class SoftmaxView {
   public:
    SoftmaxView(const Softmax& call, std::int64_t threads, std::int64_t panel) : softmax(call) {
        check_sizes(call.M, call.N, call.D, threads);
        require(call.scale >= 0x1p-100 && call.scale <= 0x1p100, "scale must be in 2^-100..2^100");
        if (call.M == 0) return;
        check_inputs(call.hidden, call.items, call.N, call.D);
        require(call.target, "target must not be a null pointer");
        const std::int64_t pad = call.skip_pad;
        for (std::int64_t m = 0; m < call.M; ++m) {
            require(call.target[m] >= pad && call.target[m] < call.N, "target must be item ids in [0, N), and not 0 with skip_pad");
            target.push_back(call.target[m] - pad);
        }
        softmax.items += pad * call.D;
        softmax.N -= pad;
        softmax.target = target.data();
        panel_ = panel;
        panels_ = (softmax.N + panel - 1) / panel;
        parts = std::clamp<std::int64_t>(softmax.N / PART_ITEMS, 1, PARTS);
        base = static_cast<float>(call.scale * LOG2E);
        base_rest = static_cast<float>(call.scale * LOG2E - static_cast<double>(base));
    }

    // The first item of a part. The last part ends at N.
    std::int64_t begin(std::int64_t part) const { return std::min(softmax.N, panels_ * part / parts * panel_); }

    Softmax softmax;
    std::vector<std::int64_t> target;
    std::int64_t parts = 0;  // the results of parts are added in order, so that the number of threads changes no bit
    float base = 0.0f, base_rest = 0.0f;  // exp(scale s) = 2^((base + base_rest) s)

   private:
    static constexpr std::int64_t PARTS = 16, PART_ITEMS = 512;
    static constexpr double LOG2E = 1.4426950408889634;
    std::int64_t panel_ = 1, panels_ = 0;
};

}  // namespace lares_fast
