// A block of queries in int8, with the values of each query that the screening bound needs.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "catalog/query_tiles.h"
#include "topk/screen_kernel.h"

namespace lares_fast {

class CodedQueries {
   public:
    CodedQueries(const float* query, std::int64_t B, std::int64_t D, const IndexTables& index, const Coding& coding, std::int64_t rows) {
        const std::int64_t words = (D + coding.group - 1) / coding.group;
        std::vector<std::uint32_t> codes(static_cast<std::size_t>(B * words));
        for (std::int64_t b = 0; b < B; ++b) code(query + b * D, D, index, coding, codes.data() + b * words);
        codes_ = query_tiles(codes.data(), B, words, rows);
    }

    CodedView view() const {
        const auto* codes = reinterpret_cast<const std::uint8_t*>(codes_.data());
        return {codes, inverse_.data(), norm_.data(), scaled_.data(), error_.data(), centred_.data()};
    }

   private:
    void code(const float* q, std::int64_t D, const IndexTables& index, const Coding& coding, std::uint32_t* words) {
        double largest = 0, norm = 0, scaled = 0, error = 0, centred = 0;
        for (std::int64_t d = 0; d < D; ++d) {
            const double x = static_cast<double>(q[d]) * index.scale[d];
            largest = std::fmax(largest, std::fabs(x));
            scaled += x * x;
            norm += static_cast<double>(q[d]) * q[d];
            centred += static_cast<double>(q[d]) * index.centre[d];
        }
        double step = largest / coding.largest;
        if (coding.bounded_norms) step = std::fmax(step, std::sqrt(scaled) / code_norm(D));
        // A query whose step is not a normal float gets an infinite norm, so that all its items survive.
        const bool usable = std::isfinite(scaled) && (step == 0 || (step > 1e-30 && step < 1e30));
        if (!usable) norm = INFINITY;
        if (!usable || step == 0) step = 1;
        for (std::int64_t d = 0; d < D; ++d) {
            const double x = usable ? static_cast<double>(q[d]) * index.scale[d] : 0;
            const double code = std::nearbyint(x / step);
            error += (x - code * step) * (x - code * step);
            const std::uint32_t byte = static_cast<std::uint32_t>(static_cast<int>(code) + coding.offset);
            // Bytes of a group beyond D stay 0. Their item codes are 0 too.
            for (int place = static_cast<int>(d % coding.group); place < 4; place += coding.group) words[d / coding.group] |= byte << 8 * place;
        }
        // Norms are rounded up.
        constexpr double up = 1 + 1e-6;
        inverse_.push_back(static_cast<float>(1 / step));
        norm_.push_back(static_cast<float>(std::sqrt(norm) * up));
        scaled_.push_back(static_cast<float>(std::sqrt(scaled) * up));
        error_.push_back(static_cast<float>(std::sqrt(error) * up));
        centred_.push_back(static_cast<float>(centred));
    }

    std::vector<std::uint32_t> codes_;
    std::vector<float> inverse_, norm_, scaled_, error_, centred_;
};

}  // namespace lares_fast
