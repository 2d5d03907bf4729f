#include "topk/topk.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#include "parallel.h"

namespace lares_fast {
namespace {

constexpr int PANEL = 16;                // items that one pass of the dot kernel scores
constexpr int ROWS = 2;                  // queries in a pass: ROWS * PANEL sums fill half of 16 SSE registers
constexpr std::int64_t BLOCK = 64;       // queries that share one walk over the catalog
constexpr std::int64_t TILE_FLOATS = 1 << 15;  // 128 KiB of items: stays in L2 while a block of queries passes over it
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

void check(const Topk& t, std::int64_t threads) {
    require(t.B >= 0 && t.N >= 0 && t.D >= 0, "B, N and D must not be negative");
    require(t.k >= 1, "k must be at least 1");
    require(threads >= 1, "threads must be at least 1");
    constexpr std::int64_t limit = std::numeric_limits<std::int64_t>::max() / 8;
    const std::int64_t width = std::max<std::int64_t>({t.D, t.k, 1});
    require(t.B <= limit / width && t.N <= limit / width, "B * D, N * D or B * k is too large");
    if (t.B == 0) return;
    require(t.query || t.D == 0, "query must not be a null pointer");
    require(t.items || t.D == 0 || t.N == 0, "items must not be a null pointer");
    require(t.scores && t.ids, "the outputs must not be null pointers");
    if (!t.exclude_offsets) return;
    require(t.exclude_offsets[0] == 0, "exclude offsets must start with 0");
    for (std::int64_t b = 0; b < t.B; ++b) {
        require(t.exclude_offsets[b] <= t.exclude_offsets[b + 1], "exclude offsets must not decrease");
    }
    const std::int64_t count = t.exclude_offsets[t.B];
    require(t.exclude_ids || count == 0, "exclude ids must not be a null pointer");
    for (std::int64_t i = 0; i < count; ++i) {
        require(t.exclude_ids[i] >= 0 && t.exclude_ids[i] < t.N, "exclude ids must be item ids in [0, N)");
    }
}

// The best k seen so far of one query, a heap with the worst on top, kept in that query's output rows.
class Best {
   public:
    Best(float* scores, std::int64_t* ids, std::int64_t k) : scores_(scores), ids_(ids), k_(k) {}

    bool full() const { return size_ == k_; }
    float worst() const { return scores_[0]; }

    // Ids arrive in ascending order, so a tie with the worst of a full heap always loses.
    void offer(float score, std::int64_t id) {
        if (!full()) {
            std::int64_t child = size_++;
            while (child > 0) {
                const std::int64_t parent = (child - 1) / 2;
                if (!worse(score, id, scores_[parent], ids_[parent])) break;
                move(parent, child);
                child = parent;
            }
            place(child, score, id);
        } else if (score > worst()) {
            sink(score, id, size_);
        }
    }

    // Heap sort in place, best first; what is missing is filled.
    void finish() {
        for (std::int64_t last = size_ - 1; last > 0; --last) {
            const float score = scores_[last];
            const std::int64_t id = ids_[last];
            move(0, last);
            sink(score, id, last);
        }
        std::fill(scores_ + size_, scores_ + k_, LOWEST);
        std::fill(ids_ + size_, ids_ + k_, std::int64_t{-1});
    }

   private:
    static bool worse(float score, std::int64_t id, float other_score, std::int64_t other_id) {
        return score < other_score || (score == other_score && id > other_id);
    }

    void place(std::int64_t slot, float score, std::int64_t id) {
        scores_[slot] = score;
        ids_[slot] = id;
    }

    void move(std::int64_t from, std::int64_t to) { place(to, scores_[from], ids_[from]); }

    // Replaces the top of the first `size` slots.
    void sink(float score, std::int64_t id, std::int64_t size) {
        std::int64_t slot = 0;
        for (std::int64_t child; (child = 2 * slot + 1) < size; slot = child) {
            if (child + 1 < size && worse(scores_[child + 1], ids_[child + 1], scores_[child], ids_[child])) ++child;
            if (!worse(scores_[child], ids_[child], score, id)) break;
            move(child, slot);
        }
        place(slot, score, id);
    }

    float* scores_;
    std::int64_t* ids_;
    std::int64_t k_, size_ = 0;
};

// A query's exclusions, ascending, walked once beside the items.
struct Excluded {
    const std::int64_t* next;
    const std::int64_t* end;

    bool contains(std::int64_t id) {
        while (next != end && *next < id) ++next;
        return next != end && *next == id;
    }
};

// Four lanes that every supported CPU has as one register; gcc and clang lower the arithmetic element by element.
typedef float Lanes __attribute__((vector_size(16)));
constexpr int WIDTH = 4;

Lanes load(const float* from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

// Scores R queries against one transposed panel [D, PANEL]. The sum over d is the outer loop, so lanes never mix
// and no sum is reordered.
template <int R>
void score_panel(const float* query, const float* panel, const float* bias, std::int64_t D, float (&scores)[ROWS][PANEL]) {
    Lanes sums[R][PANEL / WIDTH] = {};
    for (std::int64_t d = 0; d < D; ++d) {
        for (int r = 0; r < R; ++r) {
            const float q = query[r * D + d];
            for (int v = 0; v < PANEL / WIDTH; ++v) sums[r][v] += q * load(panel + d * PANEL + v * WIDTH);
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < PANEL / WIDTH; ++v) {
            const Lanes score = sums[r][v] + load(bias + v * WIDTH);
            std::memcpy(scores[r] + v * WIDTH, &score, sizeof score);
        }
        for (float& score : scores[r]) score = score == score ? score : LOWEST;
    }
}

// One thread's walk over blocks of queries.
class Walk {
   public:
    explicit Walk(const Topk& call)
        : call_(call),
          panels_(std::clamp<std::int64_t>(TILE_FLOATS / (PANEL * std::max<std::int64_t>(call.D, 1)), 1, (call.N + PANEL - 1) / PANEL + 1)),
          tile_(static_cast<std::size_t>(panels_ * PANEL * call.D)),
          bias_(static_cast<std::size_t>(panels_ * PANEL)) {}

    void block(std::int64_t first, std::int64_t last) {
        start(first, last);
        for (std::int64_t item = 0; item < call_.N; item += panels_ * PANEL) {
            const std::int64_t end = std::min(call_.N, item + panels_ * PANEL);
            pack(item, end);
            std::int64_t b = first;
            for (; b + ROWS <= last; b += ROWS) scan<ROWS>(b, first, item, end);
            for (; b < last; ++b) scan<1>(b, first, item, end);
        }
        for (Best& best : best_) best.finish();
    }

   private:
    void start(std::int64_t first, std::int64_t last) {
        best_.clear();
        excluded_.clear();
        sorted_.clear();
        for (std::int64_t b = first; b < last; ++b) best_.emplace_back(call_.scores + b * call_.k, call_.ids + b * call_.k, call_.k);
        if (!call_.exclude_offsets) {
            excluded_.assign(best_.size(), Excluded{nullptr, nullptr});
            return;
        }
        const std::int64_t* offsets = call_.exclude_offsets;
        sorted_.assign(call_.exclude_ids + offsets[first], call_.exclude_ids + offsets[last]);
        for (std::int64_t b = first; b < last; ++b) {
            std::int64_t* const begin = sorted_.data() + (offsets[b] - offsets[first]);
            std::int64_t* const end = sorted_.data() + (offsets[b + 1] - offsets[first]);
            if (!std::is_sorted(begin, end)) std::sort(begin, end);
            excluded_.push_back({begin, end});
        }
    }

    // Transposes items [item, end) into panels; the lanes past the end keep finite rubbish that `scan` never reads.
    void pack(std::int64_t item, std::int64_t end) {
        for (std::int64_t i = item; i < end; ++i) {
            const std::int64_t panel = (i - item) / PANEL, lane = (i - item) % PANEL;
            const float* row = call_.items + i * call_.D;
            float* column = tile_.data() + panel * PANEL * call_.D + lane;
            for (std::int64_t d = 0; d < call_.D; ++d) column[d * PANEL] = row[d];
            bias_[static_cast<std::size_t>(i - item)] = call_.bias ? call_.bias[i] : 0.0f;
        }
    }

    template <int R>
    void scan(std::int64_t b, std::int64_t first, std::int64_t item, std::int64_t end) {
        float scores[ROWS][PANEL];
        for (std::int64_t i = item; i < end; i += PANEL) {
            score_panel<R>(call_.query + b * call_.D, tile_.data() + (i - item) * call_.D, bias_.data() + (i - item), call_.D, scores);
            const int lanes = static_cast<int>(std::min<std::int64_t>(PANEL, end - i));
            for (int r = 0; r < R; ++r) select(static_cast<std::size_t>(b + r - first), scores[r], i, lanes);
        }
    }

    void select(std::size_t row, const float* scores, std::int64_t id, int lanes) {
        Best& best = best_[row];
        if (best.full()) {
            bool any = false;
            for (int lane = 0; lane < PANEL; ++lane) any |= scores[lane] > best.worst();
            if (!any) return;
        }
        for (int lane = 0; lane < lanes; ++lane) {
            if (best.full() && !(scores[lane] > best.worst())) continue;
            if (!excluded_[row].contains(id + lane)) best.offer(scores[lane], id + lane);
        }
    }

    const Topk& call_;
    std::int64_t panels_;
    std::vector<float> tile_, bias_;
    std::vector<std::int64_t> sorted_;
    std::vector<Excluded> excluded_;
    std::vector<Best> best_;
};

}  // namespace

void topk_cpu(const Topk& call, std::int64_t threads) {
    check(call, threads);
    if (call.B == 0) return;
    threads = std::min({threads, call.B, std::int64_t{1024}});
    const std::int64_t size = std::min(BLOCK, (call.B + threads - 1) / threads);
    const std::int64_t blocks = (call.B + size - 1) / size;
    std::atomic<std::int64_t> next{0};
    run_on_threads(std::min(threads, blocks), [&] {
        Walk walk(call);
        for (std::int64_t block; (block = next.fetch_add(1)) < blocks;) walk.block(block * size, std::min(call.B, (block + 1) * size));
    });
}

}  // namespace lares_fast
