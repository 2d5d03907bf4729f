// The kernel of the target's rank and its launch. nvcc compiles it for devices, and g++ for csrc/emulator.
#pragma once

#include "catalog/scores.cuh"
#include "target_rank/target_rank_cuda.h"

namespace lares_fast {

struct RankDeviceScan {
    Scores scores;
    const std::int64_t* target;
    const std::int64_t* exclude_offsets;
    const std::int64_t* exclude_ids;
    std::int64_t E;
    unsigned long long* of_all;
    unsigned long long* of_kept;
    bool ties_by_id;
    int item_tiles, splits;
};

// A set of items of a tile, one bit an item. Lane i of a warp knows the sets of query i.
using Items = unsigned long long;
static_assert(TILE_ITEMS == 64);

__device__ __forceinline__ Items items_before(std::int64_t place) {
    return place >= TILE_ITEMS ? ~Items{0} : place <= 0 ? Items{0} : (Items{1} << place) - 1;
}

// N is below this number.
constexpr std::uint32_t NO_TARGET = ~std::uint32_t{0};

struct RankWarp {
    const RankDeviceScan& call;
    Lane lane;
    int first_query;
    std::uint32_t target;  // the target of query `lane`; NO_TARGET if it is not an item. The next three members also belong to query `lane`
    const std::int64_t* excluded;  // the ids of the list that are still to come
    std::uint32_t excluded_left;
    float own;
    // Counts over the lane's columns, for each of its rows.
    unsigned of_all[LANE_ROWS], of_kept[LANE_ROWS];

    __device__ RankWarp(const RankDeviceScan& c, std::int64_t first_item)
        : call(c), target(NO_TARGET), excluded(nullptr), excluded_left(0), own(0), of_all{}, of_kept{} {
        first_query = static_cast<int>(blockIdx.x) * TILE_QUERIES + static_cast<int>(threadIdx.x) / WARP * WARP_QUERIES;
        const int query = first_query + lane.lane;
        if (query >= call.scores.B) return;
        const std::int64_t id = call.target[query];
        if (id >= 0 && id < call.scores.N) target = static_cast<std::uint32_t>(id);
        const ExcludedItems list = excluded_list(query);
        if (!list.valid) return;
        excluded = list.ids;
        excluded_left = list.count;
        std::uint32_t left = list.count;
        while (left > 0) {
            const std::uint32_t half = left / 2;
            if (excluded[half] < first_item) {
                excluded += half + 1;
                excluded_left -= half + 1;
                left -= half + 1;
            } else {
                left = half;
            }
        }
    }

    __device__ __forceinline__ ExcludedItems excluded_list(int query) const {
        return excluded_items(call.exclude_offsets, call.exclude_ids, call.E, query, call.scores.N);
    }

    // The scores of the targets themselves are on the diagonal of a tile of the block's targets.
    __device__ __forceinline__ void take_own(const Tile& tile, const float (&sums)[SUMS]) {
        const int warp = static_cast<int>(threadIdx.x) / WARP;
        if (warp / 2 != (tile.ids - call.target) % TILE_QUERIES / TILE_ITEMS) return;
        const int group = lane.lane % 8;
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            // Row i of a group is item 8 i + group of the warp's half of the tile.
            const int low = i * ROW_SUMS + 2 * i, high = low + ROW_SUMS / 2;
            const float even = warp % 2 ? sums[high] : sums[low], odd = warp % 2 ? sums[high + 1] : sums[low + 1];
            const float score = __shfl_sync(ALL_LANES, lane.group % 2 ? odd : even, group * 4 + group / 2);
            if (lane.lane / 8 == i) own = score;
        }
        const int query = first_query + lane.lane;
        if (query < call.scores.B && !finite(own)) {
            own = target != NO_TARGET ? plain_score(call.scores, query, target) : -INFINITY;
        }
    }

    __device__ __forceinline__ void count(const Tile& tile, const float (&sums)[SUMS]) {
        const std::int64_t target_place = std::int64_t{target} - tile.first;
        // The target never outranks itself, whatever its sum is.
        Items absent = ~items_before(tile.count);
        if (target_place >= 0 && target_place < TILE_ITEMS) absent |= Items{1} << target_place;
        Items gone = absent;
        for (; excluded_left > 0 && *excluded < std::int64_t{tile.first} + TILE_ITEMS; ++excluded, --excluded_left) {
            if (*excluded >= tile.first) gone |= Items{1} << (*excluded - tile.first);
        }
        const Items before = call.ties_by_id ? items_before(target_place) : 0;
        Items odd = 0;
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            const float least = __shfl_sync(ALL_LANES, own, lane.row(i));
            Items above = 0, equal = 0;
#pragma unroll
            for (int n = 0; n < ROW_SUMS; ++n) {
                const float score = sums[i * ROW_SUMS + n];
                const Items bit = Items{1} << (n / 2 * 8 + n % 2);
                if (!finite(score)) {
                    odd |= Items{1} << (i * ROW_SUMS + n);
                } else if (score > least) {
                    above |= bit;
                } else if (score == least) {
                    equal |= bit;
                }
            }
            const int shift = 2 * lane.member;
            const Items better = above << shift | (equal << shift & __shfl_sync(ALL_LANES, before, lane.row(i)));
            of_all[i] += static_cast<unsigned>(__popcll(better & ~__shfl_sync(ALL_LANES, absent, lane.row(i))));
            of_kept[i] += static_cast<unsigned>(__popcll(better & ~__shfl_sync(ALL_LANES, gone, lane.row(i))));
        }
        odd = worth_a_look(odd, call.scores, tile, lane, first_query, own);
        while (__any_sync(ALL_LANES, odd != 0)) {
            const int at = odd ? __ffsll(static_cast<long long>(odd)) - 1 : 0;
            const int row = lane.row(at / ROW_SUMS), column = lane.column(at % ROW_SUMS);
            const float least = __shfl_sync(ALL_LANES, own, row);
            const bool tie_counts = __shfl_sync(ALL_LANES, before, row) >> column & 1;
            const bool is_absent = __shfl_sync(ALL_LANES, absent, row) >> column & 1;
            const bool is_gone = __shfl_sync(ALL_LANES, gone, row) >> column & 1;
            bool better = odd && !is_absent;
            if (better) {
                const float score = plain_score(call.scores, first_query + row, std::int64_t{tile.first} + column);
                better = score > least || (score == least && tie_counts);
            }
#pragma unroll
            for (int i = 0; i < LANE_ROWS; ++i) {
                of_all[i] += better && at / ROW_SUMS == i;
                of_kept[i] += better && !is_gone && at / ROW_SUMS == i;
            }
            odd &= odd - 1;
        }
    }

    __device__ __forceinline__ void add_up() const {
        const bool has_rank = target != NO_TARGET, valid = has_rank && excluded_list(first_query + lane.lane).valid;
        // The rank behind all items. It is counted in one split only.
        const unsigned behind = blockIdx.y == 0 ? static_cast<unsigned>(call.scores.N) : 0;
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            unsigned all = of_all[i], kept = of_kept[i];
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) {
                all += __shfl_xor_sync(ALL_LANES, all, distance);
                kept += __shfl_xor_sync(ALL_LANES, kept, distance);
            }
            if (!__shfl_sync(ALL_LANES, has_rank, lane.row(i))) all = behind;
            if (!__shfl_sync(ALL_LANES, valid, lane.row(i))) kept = behind;
            const int query = first_query + lane.row(i);
            if (lane.member > 0 || query >= call.scores.B) continue;
            atomicAdd(call.of_all + query, static_cast<unsigned long long>(all));
            atomicAdd(call.of_kept + query, static_cast<unsigned long long>(kept));
        }
    }
};

// Counts over one split, which is a run of consecutive tiles. Before it come the tiles of the block's own targets.
template <bool PLAIN>
__global__ void __launch_bounds__(THREADS, BLOCKS_A_MULTIPROCESSOR) rank_count(const __grid_constant__ RankDeviceScan call) {
    constexpr int OWN_TILES = TILE_QUERIES / TILE_ITEMS;
    const std::int64_t tiles = call.item_tiles;
    const int first = static_cast<int>(tiles * blockIdx.y / call.splits), last = static_cast<int>(tiles * (blockIdx.y + 1) / call.splits);
    RankWarp warp(call, std::int64_t{first} * TILE_ITEMS);
    const auto tile_of = [&](int tile) {
        if (tile >= first) return consecutive(tile, call.scores.N);
        const int query = static_cast<int>(blockIdx.x) * TILE_QUERIES + (tile - first + OWN_TILES) * TILE_ITEMS;
        return Tile{call.target + query, 0, call.scores.B - query};
    };
    for_each_tile<PLAIN>(call.scores, last - first + OWN_TILES, first - OWN_TILES, [](int tile) { return tile + 1; }, tile_of,
                [&](const Tile& tile, const float(&sums)[SUMS]) {
        if (tile.ids) {
            warp.take_own(tile, sums);
        } else {
            warp.count(tile, sums);
        }
    });
    warp.add_up();
}

// `device` is as in enqueue_topk.
template <class Device>
void enqueue_target_rank(Device& device, const TargetRankCuda& call, const ScanPlan& plan) {
    RankDeviceScan count{};
    count.scores = make_scores(call, plan);
    count.target = call.target;
    count.exclude_offsets = call.exclude_offsets;
    count.exclude_ids = call.exclude_ids;
    count.E = call.E;
    count.of_all = reinterpret_cast<unsigned long long*>(call.of_all);
    count.of_kept = reinterpret_cast<unsigned long long*>(call.of_kept);
    count.ties_by_id = call.ties_by_id;
    count.item_tiles = static_cast<int>(plan.item_tiles);
    count.splits = static_cast<int>(plan.splits);
    const std::size_t bytes = sizeof(std::int64_t) * static_cast<std::size_t>(call.B);
    device.clear(call.of_all, bytes);
    device.clear(call.of_kept, bytes);
    device.launch(call.plain ? rank_count<true> : rank_count<false>,
                  dim3(static_cast<unsigned>(plan.query_tiles), static_cast<unsigned>(plan.splits)), THREADS, plan.shared_bytes, count);
}

}  // namespace lares_fast
