#include "topk/topk.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "parallel.h"
#include "simd/dispatch.h"
#include "topk/checks.h"
#include "topk/coded_queries.h"
#include "topk/query_tiles.h"
#include "topk/scratch.h"
#include "topk/screen_kernel.h"
#include "topk/topk_kernel.h"

namespace lares_fast {

LARES_DISPATCH(TopkKernel, topk_kernel)

namespace {

constexpr std::int64_t BLOCK = 1024;             // queries that share one walk over the catalog
constexpr std::int64_t CANDIDATE_BYTES = 16 << 20;  // of one block, so that a large K takes smaller blocks
constexpr std::int64_t CHUNK = 32768;            // items a thread takes at a time
constexpr std::int64_t SEED = 512 * 48;          // about 24 thousand items, a multiple of every panel
constexpr std::size_t FEW = 384;                 // keys below which comparing all pairs beats a sort
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

void check(const Topk& t, std::int64_t threads) {
    check_sizes(t.B, t.N, t.D, threads);
    require(t.k >= 1, "k must be at least 1");
    require(t.B <= SIZE_LIMIT / std::max<std::int64_t>(t.k, 1), "B * k is too large");
    if (t.B == 0) return;
    check_inputs(t.query, t.items, t.N, t.D);
    require(t.scores && t.ids, "the outputs must not be null pointers");
    check_exclude(t.exclude_offsets, t.exclude_ids, t.B, t.N);
}

// One thread's candidates for a block of queries.
class Walk {
   public:
    Walk(const Topk& call, const float* query, std::int64_t first, std::int64_t B, const TopkKernel& kernel) : call_(call), kernel_(kernel) {
        const std::int64_t K = std::min(call.k, call.N);
        Candidates& c = scan_.best;
        c.K = K;
        c.capacity = capacity(K, kernel);
        c.stride = c.capacity + kernel.slack;
        const auto slots = static_cast<std::size_t>(B * c.stride), rows = static_cast<std::size_t>(B);
        scores_.reset(new float[slots]);
        ids_.reset(new std::int32_t[slots]);
        scratch_ = make_scratch(kernel.panel * (call.D + 1));
        size_.assign(rows, 0);
        clean_.assign(rows, 0);
        threshold_.assign(rows, std::numeric_limits<float>::quiet_NaN());
        c.scores = scores_.get();
        c.ids = ids_.get();
        c.size = size_.data();
        c.clean = clean_.data();
        c.threshold = threshold_.data();
        if (call.exclude_offsets) {
            excluded_.assign(call, first, B);
            for (std::int64_t b = 0; b < B; ++b) {
                next_.push_back(excluded_.begin(b));
                end_.push_back(excluded_.last(b));
            }
            c.excluded = next_.data();
            c.excluded_end = end_.data();
        }
        scan_.catalog = {call.items, call.index.panels, call.bias, call.N, call.D};
        scan_.query = query;
        scan_.B = B;
        scan_.scratch = scratch_.get();
    }

    static std::int64_t capacity(std::int64_t K, const TopkKernel& kernel) { return std::max(2 * K, K + 96) + kernel.panel; }

    // Screens with `screener`; the queries' codes must outlive the walk.
    void screen_with(const ScreenKernel& screener, const CodedQueries& queries, std::int64_t first_query) {
        screener_ = &screener;
        pending_.resize(static_cast<std::size_t>(scan_.B * screener.pending_stride));
        waiting_.assign(static_cast<std::size_t>(scan_.B), 0);
        const IndexTables& index = call_.index;
        screen_ = {scan_, call_.query + first_query * call_.D, index.codes, index.start, index.bounds, (call_.D + 3) / 4,
                   queries.view(), pending_.data(), waiting_.data()};
    }

    void items(std::int64_t first, std::int64_t last) {
        while (first < last) {
            if (!screener_ || plain_ > 0) {
                const std::int64_t to = screener_ ? std::min(last, first + plain_) : last;
                kernel_.scan(scan_, first, to);
                plain_ -= to - first;
                first = to;
            } else {
                first = screener_->screen(screen_, first, last);
                if (first == last) break;
                // Too much survives here: fp32 for a while, and for longer each time.
                plain_ = patience_;
                patience_ *= 4;
            }
        }
    }

    void finish() {
        for (std::int64_t b = 0; b < scan_.B; ++b) kernel_.compact(scan_.best, b);
    }

    // Adds the candidates of query b as keys, whose order is that of the results.
    void keys(std::int64_t b, std::vector<std::uint64_t>& keys) const {
        const Candidates& c = scan_.best;
        for (std::int64_t i = 0; i < c.size[b]; ++i) keys.push_back(key(c.scores[b * c.stride + i], c.ids[b * c.stride + i]));
    }

    static std::uint64_t key(float score, std::int32_t id) {
        std::int32_t bits;
        score += 0.0f;  // -0 and 0 tie
        std::memcpy(&bits, &score, sizeof bits);
        const auto ascending = static_cast<std::uint32_t>(bits ^ ((bits >> 31) & 0x7fffffff)) ^ 0x80000000u;
        return std::uint64_t{~ascending} << 32 | static_cast<std::uint32_t>(id);
    }

    static float score(std::uint64_t key) {
        const std::uint32_t ascending = ~static_cast<std::uint32_t>(key >> 32) ^ 0x80000000u;
        auto bits = static_cast<std::int32_t>(ascending);
        bits ^= (bits >> 31) & 0x7fffffff;
        float score;
        std::memcpy(&score, &bits, sizeof score);
        return score;
    }

   private:
    const Topk& call_;
    const TopkKernel& kernel_;
    Scan scan_{};
    std::unique_ptr<float[]> scores_;
    Scratch scratch_;
    std::unique_ptr<std::int32_t[]> ids_;
    std::vector<std::int64_t> size_, clean_;
    std::vector<float> threshold_;
    const ScreenKernel* screener_ = nullptr;
    Screen screen_{};
    // Items to score in fp32 before the next attempt to screen. The first of them give the threshold.
    std::int64_t plain_ = SEED, patience_ = SEED;
    std::vector<std::int32_t> pending_, waiting_;
    SortedExclusions excluded_;
    std::vector<const std::int64_t*> next_, end_;
};

void write(const Topk& call, std::int64_t b, const TopkKernel& kernel, std::vector<std::uint64_t>& keys) {
    const std::int64_t found = std::min<std::int64_t>(call.k, static_cast<std::int64_t>(keys.size()));
    if (keys.size() <= FEW) {
        const std::vector<std::uint64_t> unsorted = keys;
        kernel.sort_few(unsorted.data(), static_cast<std::int64_t>(unsorted.size()), keys.data());
    } else {
        std::sort(keys.begin(), keys.end());
    }
    float* scores = call.scores + b * call.k;
    std::int64_t* ids = call.ids + b * call.k;
    for (std::int64_t i = 0; i < found; ++i) {
        scores[i] = Walk::score(keys[static_cast<std::size_t>(i)]);
        ids[i] = static_cast<std::int64_t>(keys[static_cast<std::size_t>(i)] & 0xffffffffu);
    }
    std::fill(scores + found, scores + call.k, LOWEST);
    std::fill(ids + found, ids + call.k, std::int64_t{-1});
}

}  // namespace

void topk_cpu(const Topk& call, std::int64_t threads) {
    check(call, threads);
    if (call.B == 0) return;
    const TopkKernel& kernel = topk_kernel();
    const std::int64_t K = std::min(call.k, call.N);
    const std::int64_t candidate = 8 * (Walk::capacity(K, kernel) + kernel.slack);
    const std::int64_t block = std::clamp<std::int64_t>(CANDIDATE_BYTES / candidate, kernel.rows, BLOCK);
    const std::int64_t chunk = CHUNK / kernel.panel * kernel.panel;
    const std::int64_t chunks = (call.N + chunk - 1) / chunk;
    for (std::int64_t first = 0; first < call.B; first += block) {
        const std::int64_t B = std::min(block, call.B - first);
        const std::vector<float> query = query_tiles(call.query + first * call.D, B, call.D, kernel.rows);
        // Threads share out the catalog: each walks ascending ids of its own, and the order of results is total.
        const std::int64_t walkers = std::clamp<std::int64_t>(std::min(threads, chunks), 1, 1024);
        const ScreenKernel* screener = call.index.codes && !call.bias ? screen_kernel() : nullptr;
        const CodedQueries codes(screener ? B : 0, call.query + first * call.D, call.D, call.index.centre, kernel.rows);
        std::vector<std::unique_ptr<Walk>> walks(static_cast<std::size_t>(walkers));
        std::atomic<std::int64_t> next_walk{0}, next_chunk{0};
        run_on_threads(walkers, [&] {
            auto& walk = walks[static_cast<std::size_t>(next_walk.fetch_add(1))];
            walk = std::make_unique<Walk>(call, query.data(), first, B, kernel);
            if (screener) walk->screen_with(*screener, codes, first);
            for (std::int64_t c; (c = next_chunk.fetch_add(1)) < chunks;) walk->items(c * chunk, std::min(call.N, (c + 1) * chunk));
            walk->finish();
        });
        std::vector<std::uint64_t> keys;
        for (std::int64_t b = 0; b < B; ++b) {
            keys.clear();
            for (const auto& walk : walks) {
                if (walk) walk->keys(b, keys);
            }
            write(call, first + b, kernel, keys);
        }
    }
}

}  // namespace lares_fast
