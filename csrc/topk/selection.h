// The selection of the best K items for a block of queries by one thread: it scores or screens items and keeps candidates.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "catalog/exclusions.h"
#include "catalog/query_tiles.h"
#include "memory/aligned.h"
#include "topk/coded_queries.h"
#include "topk/screen_kernel.h"
#include "topk/topk.h"
#include "topk/topk_kernel.h"

namespace lares_fast {

// Returns a result as an integer. Ascending keys are descending scores, and ascending ids for equal scores. -0 and 0 are
// equal.
inline std::uint64_t make_key(float score, std::int32_t id) {
    std::int32_t bits;
    score += 0.0f;
    std::memcpy(&bits, &score, sizeof bits);
    const auto ascending = static_cast<std::uint32_t>(bits ^ ((bits >> 31) & 0x7fffffff)) ^ 0x80000000u;
    return std::uint64_t{~ascending} << 32 | static_cast<std::uint32_t>(id);
}

inline float key_score(std::uint64_t key) {
    auto bits = static_cast<std::int32_t>(~static_cast<std::uint32_t>(key >> 32) ^ 0x80000000u);
    bits ^= (bits >> 31) & 0x7fffffff;
    float score;
    std::memcpy(&score, &bits, sizeof score);
    return score;
}

inline std::int64_t key_id(std::uint64_t key) { return static_cast<std::int64_t>(key & 0xffffffffu); }

// The queries `rows` of a call, which share one pass over the catalog. All constructor arguments must outlive it.
struct QueryBlock {
    QueryBlock(const Topk& call, const std::vector<std::int64_t>& rows, std::int64_t K, const SortedExclusions& excluded,
               const TopkKernel& kernel, const ScreenKernel* screen)
        : call(call), rows(rows.data()), B(static_cast<std::int64_t>(rows.size())), K(K), excluded(excluded), kernel(kernel),
          screen(screen) {
        for (const std::int64_t row : rows) query.insert(query.end(), call.query + row * call.D, call.query + (row + 1) * call.D);
        tiles = query_tiles(query.data(), B, call.D, kernel.rows);
        if (screen) codes = std::make_unique<CodedQueries>(query.data(), B, call.D, call.index, screen->coding, kernel.rows);
    }

    const Topk& call;
    const std::int64_t* rows;
    std::int64_t B, K;
    const SortedExclusions& excluded;
    const TopkKernel& kernel;
    // Null if nothing is screened.
    const ScreenKernel* screen;
    std::vector<float> query, tiles;
    std::unique_ptr<const CodedQueries> codes;
};

// The candidates of one thread for a block of queries.
class BlockSelection {
   public:
    // Selects the best K, which may differ from the block's K. `thresholds` [B] are scores that the best K very likely beat;
    // with an empty vector the selection finds its thresholds itself.
    BlockSelection(const QueryBlock& block, std::int64_t K, const std::vector<float>& thresholds, bool screened)
        : block_(block), threshold_(thresholds) {
        const auto B = static_cast<std::size_t>(block.B);
        Candidates& c = scan_.best;
        c.K = K;
        c.capacity = capacity(K, block.kernel);
        c.stride = c.capacity + block.kernel.slack;
        scores_.reset(new float[B * static_cast<std::size_t>(c.stride)]);
        ids_.reset(new std::int32_t[B * static_cast<std::size_t>(c.stride)]);
        scratch_ = aligned_floats(block.kernel.panel * (block.call.D + 1));
        size_.assign(B, 0);
        clean_.assign(B, 0);
        if (threshold_.empty()) threshold_.assign(B, std::numeric_limits<float>::quiet_NaN());
        c.scores = scores_.get();
        c.ids = ids_.get();
        c.size = size_.data();
        c.clean = clean_.data();
        c.threshold = threshold_.data();
        if (block.call.exclude_offsets) {
            for (std::int64_t b = 0; b < block.B; ++b) {
                next_.push_back(block.excluded.begin(block.rows[b]));
                end_.push_back(block.excluded.end(block.rows[b]));
            }
            c.excluded = next_.data();
            c.excluded_end = end_.data();
        }
        scan_.catalog = {block.call.items, block.call.index.panels, block.call.bias, block.call.N, block.call.D};
        scan_.query = block.tiles.data();
        scan_.B = block.B;
        scan_.scratch = scratch_.get();
        if (!block.screen || !screened) return;
        plain_ = thresholds.empty() ? PATIENCE : 0;
        pending_.resize(B * static_cast<std::size_t>(block.screen->pending_stride));
        waiting_.assign(B, 0);
        limits_.resize(B);
        screen_ = {scan_, block.query.data(), block.call.index, block.codes->view(), pending_.data(), waiting_.data(), limits_.data()};
    }

    static std::int64_t bytes_a_query(std::int64_t K, const TopkKernel& kernel) {
        return static_cast<std::int64_t>(sizeof(float) + sizeof(std::int32_t)) * (capacity(K, kernel) + kernel.slack);
    }

    // Offers the items [first, last). `first` is the beginning of a panel, and ids must ascend from call to call.
    void add_items(std::int64_t first, std::int64_t last) {
        while (first < last) {
            if (plain_ > 0) {
                const std::int64_t to = last - first < plain_ ? last : first + plain_;
                block_.kernel.scan(scan_, first, to);
                plain_ -= to - first;
                first = to;
            } else {
                first = block_.screen->screen(screen_, first, last);
                if (first == last) break;
                // Too many items survive the screen here. Use fp32 for some time, and each time for longer.
                plain_ = patience_;
                patience_ *= 4;
            }
        }
    }

    // Reduces the candidates of each query to about K. No items may be added afterwards.
    void finish() {
        for (std::int64_t b = 0; b < scan_.B; ++b) block_.kernel.compact(scan_.best, b);
    }

    float threshold(std::int64_t b) const { return threshold_[static_cast<std::size_t>(b)]; }

    // Appends the candidates of query b to `keys`.
    void append_keys(std::int64_t b, std::vector<std::uint64_t>& keys) const {
        const Candidates& c = scan_.best;
        for (std::int64_t i = b * c.stride; i < b * c.stride + c.size[b]; ++i) keys.push_back(make_key(c.scores[i], c.ids[i]));
    }

   private:
    // A number of items that is a multiple of every panel size.
    static constexpr std::int64_t PATIENCE = 512 * 48;

    static std::int64_t capacity(std::int64_t K, const TopkKernel& kernel) { return std::max(2 * K, K + 96) + kernel.panel; }

    const QueryBlock& block_;
    TopkScan scan_{};
    Screen screen_{};
    std::unique_ptr<float[]> scores_;
    std::unique_ptr<std::int32_t[]> ids_;
    AlignedFloats scratch_;
    std::vector<float> threshold_;
    std::vector<std::int64_t> size_, clean_;
    std::vector<const std::int64_t*> next_, end_;
    std::vector<std::int32_t> pending_, waiting_, limits_;
    // How many items to score in fp32 before screening is tried again.
    std::int64_t plain_ = std::numeric_limits<std::int64_t>::max(), patience_ = PATIENCE;
};

}  // namespace lares_fast
