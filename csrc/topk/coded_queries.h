// A block of queries in int8, with what the screening bound needs to know of each.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "topk/query_tiles.h"
#include "topk/screen_kernel.h"

namespace lares_fast {

class CodedQueries {
   public:
    CodedQueries(std::int64_t B, const float* query, std::int64_t D, const float* centre, std::int64_t rows) {
        const std::int64_t words = (D + 3) / 4;
        std::vector<std::uint32_t> codes(static_cast<std::size_t>(B * words));
        for (std::int64_t b = 0; b < B; ++b) code(query + b * D, D, centre, codes.data() + b * words);
        codes_ = query_tiles(codes.data(), B, words, rows);
    }

    ScreenQueries view() const {
        return {reinterpret_cast<const std::uint8_t*>(codes_.data()), inverse_.data(), norm_.data(), error_.data(), centred_.data()};
    }

   private:
    void code(const float* q, std::int64_t D, const float* centre, std::uint32_t* words) {
        double largest = 0, norm = 0, error = 0, centred = 0;
        for (std::int64_t d = 0; d < D; ++d) largest = std::fmax(largest, std::fabs(static_cast<double>(q[d])));
        const double scale = largest > 0 && std::isfinite(largest) ? largest / 127 : 1;
        for (std::int64_t d = 0; d < D; ++d) {
            const double code = std::isfinite(q[d]) ? std::nearbyint(q[d] / scale) : 0;
            norm += static_cast<double>(q[d]) * q[d];
            error += (q[d] - code * scale) * (q[d] - code * scale);
            centred += static_cast<double>(q[d]) * centre[d];
            words[d / 4] |= static_cast<std::uint32_t>(static_cast<int>(code) + 128) << d % 4 * 8;
        }
        // What is beyond D stays 0: its item codes are 0 too. Norms are rounded up; a non-finite query's are not finite,
        // and all its items survive.
        constexpr double up = 1 + 1e-6;
        inverse_.push_back(static_cast<float>(1 / scale));
        norm_.push_back(static_cast<float>(std::sqrt(norm) * up));
        error_.push_back(static_cast<float>(std::sqrt(error) * up));
        centred_.push_back(static_cast<float>(centred));
    }

    std::vector<std::uint32_t> codes_;
    std::vector<float> inverse_, norm_, error_, centred_;
};

}  // namespace lares_fast
