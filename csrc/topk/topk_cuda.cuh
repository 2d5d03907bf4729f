// The kernels of top-K and their launches. nvcc compiles them for devices, and g++ for csrc/emulator.
#pragma once

#include "topk/sorted_list.cuh"
#include "topk/topk_cuda.h"

namespace lares_fast {

struct TopkDeviceScan {
    Scores scores;
    const std::int64_t* exclude_offsets;
    const std::int64_t* exclude_ids;
    std::int64_t E;
    // [B]: a rank that at least k candidates of the query reach. Every split raises it. It is only a hint: no thread waits
    // for it.
    Rank* reached;
    Rank* lists;  // [splits, B, sorted + QUEUE]
    int k, sorted, splits, item_tiles;
    // The distances from the first tile of a split to the first tile of the next split, and from a tile of a split to its next
    // one, modulo the number of tiles.
    int stride, step;
};

__device__ inline bool contains(const std::int64_t* ids, std::uint32_t count, std::int64_t id) {
    while (count > 0) {
        const std::uint32_t half = count / 2;
        if (ids[half] == id) return true;
        if (ids[half] < id) {
            ids += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return false;
}

// The queries of one warp. Lane i keeps the threshold of query i.
struct TopkWarp {
    const TopkDeviceScan& scan;
    Lane lane;
    int first_query;
    Rank threshold;

    __device__ explicit TopkWarp(const TopkDeviceScan& s) : scan(s), threshold(0) {
        first_query = static_cast<int>(blockIdx.x) * TILE_QUERIES + first_row();
        waiting()[lane.lane] = 0;
        for (int row = 0; row < WARP_QUERIES && first_query + row < s.scores.B; ++row) {
            for (int at = lane.lane; at < s.sorted; at += WARP) list(row)[at] = 0;
        }
        __syncwarp();
    }

    __device__ __forceinline__ static int first_row() { return static_cast<int>(threadIdx.x) / WARP * WARP_QUERIES; }

    // [WARP_QUERIES] in shared memory: the number of candidates in each queue.
    __device__ __forceinline__ int* waiting() const { return query_words(scan.scores) + first_row(); }

    __device__ __forceinline__ Rank* list(int row) const {
        return scan.lists + (std::int64_t{blockIdx.y} * scan.scores.B + first_query + row) * (scan.sorted + QUEUE);
    }

    __device__ __forceinline__ Rank* queue(int row) const { return list(row) + scan.sorted; }

    // Moves the queue of query `row` into its list.
    __device__ void flush(int row) {
        __syncwarp();
        const Rank mine = lane.lane < waiting()[row] ? queue(row)[lane.lane] : 0;
        merge(list(row), scan.sorted, sort(mine, lane.lane), lane.lane);
        __syncwarp();
        const Rank last = list(row)[scan.k - 1];
        if (lane.lane == row && last > threshold) threshold = last;
        if (lane.lane == 0) {
            waiting()[row] = 0;
            if (last) atomicMax(scan.reached + first_query + row, last);
        }
        __syncwarp();
    }

    __device__ __forceinline__ bool excluded(int query, std::int64_t item) const {
        const ExcludedItems list = excluded_items(scan.exclude_offsets, scan.exclude_ids, scan.E, query, scan.scores.N);
        return contains(list.ids, list.count, item);
    }

    // Queues the items that may be among the best.
    __device__ __forceinline__ void offer(const Tile& tile, const float (&sums)[SUMS]) {
        if (first_query + lane.lane < scan.scores.B) {
            const Rank shared = load_relaxed(scan.reached + first_query + lane.lane);
            threshold = shared > threshold ? shared : threshold;
        }
        unsigned long long left = 0;
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) {
            const float least = rank_score(__shfl_sync(ALL_LANES, threshold, lane.row(i)));
#pragma unroll
            for (int n = 0; n < ROW_SUMS; ++n) {
                const int at = i * ROW_SUMS + n;
                // A sum that is not finite always passes, so that it is computed again.
                if (!(sums[at] < least && sums[at] >= -FLT_MAX)) left |= 1ull << at;
            }
        }
        left = worth_a_look(left, scan.scores, tile, lane, first_query, rank_score(threshold));
        while (__any_sync(ALL_LANES, left != 0)) {
            if (lane.lane == 0) count_slow("round");
            const int at = left ? __ffsll(static_cast<long long>(left)) - 1 : 0;
            const int row = lane.row(at / ROW_SUMS);
            const int query = first_query + row;
            const std::int64_t item = tile.item(lane.column(at % ROW_SUMS), scan.scores.N);
            const Rank least = __shfl_sync(ALL_LANES, threshold, row);
            if (left && item >= 0) {
                float score = pick(sums, at);
                if (!finite(score)) score = plain_score(scan.scores, query, item);
                const Rank rank = make_rank(score, item);
                if (rank > least && !excluded(query, item)) queue(row)[atomicAdd(waiting() + row, 1)] = rank;
            }
            left &= left - 1;
            __syncwarp();
            // Four lanes share a row, so a queue grows by at most four in a round.
            unsigned full = __ballot_sync(ALL_LANES, waiting()[lane.lane] > QUEUE - 4);
            for (; full; full &= full - 1) flush(__ffs(static_cast<int>(full)) - 1);
            __syncwarp();
        }
    }
};

// Selects the best of the tiles of one split, in one list a query.
template <bool PLAIN>
__global__ void __launch_bounds__(THREADS, BLOCKS_A_MULTIPROCESSOR) topk_scan(const __grid_constant__ TopkDeviceScan scan) {
    TopkWarp warp(scan);
    const int split = static_cast<int>(blockIdx.y);
    const int tiles = (scan.item_tiles - split + scan.splits - 1) / scan.splits;
    const int first = tiles > 0 ? static_cast<int>(std::int64_t{split} * scan.stride % scan.item_tiles) : 0;
    const auto after = [&](int tile) {
        const int left = scan.item_tiles - tile;
        return scan.step < left ? tile + scan.step : scan.step - left;
    };
    const auto tile_of = [&](int tile) { return consecutive(tile, scan.scores.N); };
    for_each_tile<PLAIN>(scan.scores, tiles, first, after, tile_of, [&](const Tile& tile, const float(&sums)[SUMS]) { warp.offer(tile, sums); });
    for (int row = 0; row < WARP_QUERIES && warp.first_query + row < scan.scores.B; ++row) {
        if (warp.waiting()[row] > 0) warp.flush(row);
    }
}

// Merges the lists of a query into its first list, and writes the outputs. Each block has one query.
__global__ void __launch_bounds__(512) topk_merge(const __grid_constant__ TopkDeviceScan scan, float* scores, std::int64_t* ids) {
    const int lane = static_cast<int>(threadIdx.x) % WARP, warp = static_cast<int>(threadIdx.x) / WARP;
    const int warps = static_cast<int>(blockDim.x) / WARP;
    const std::int64_t query = blockIdx.x;
    const auto list = [&](int split) {
        return scan.lists + (std::int64_t{split} * scan.scores.B + query) * (scan.sorted + QUEUE);
    };
    const Rank reached = scan.reached[query];
    const auto take = [&](int from) {
        for (int at = 0; at < scan.sorted; at += WARP) {
            const Rank mine = list(from)[at + lane];
            const Rank best = __shfl_sync(ALL_LANES, mine, 0);
            if (best == 0 || best < reached) return;
            merge(list(warp), scan.sorted, mine, lane);
        }
    };
    for (int split = warp + warps; split < scan.splits; split += warps) take(split);
    for (int apart = warps / 2; apart > 0; apart /= 2) {
        __syncthreads();
        if (warp < apart && warp + apart < scan.splits) take(warp + apart);
    }
    if (warp > 0) return;
    const bool valid = excluded_items(scan.exclude_offsets, scan.exclude_ids, scan.E, query, scan.scores.N).valid;
    for (int at = lane; at < scan.k; at += WARP) {
        const Rank rank = list(0)[at];
        scores[query * scan.k + at] = valid ? rank_score(rank) : NAN;
        ids[query * scan.k + at] = valid ? rank_id(rank) : -1;
    }
}

// `device` has clear(pointer, bytes) and launch(kernel, grid, threads, shared bytes, arguments...).
template <class Device>
void enqueue_topk(Device& device, const TopkCuda& call, const TopkPlan& plan) {
    TopkDeviceScan scan{};
    scan.scores = make_scores(call, plan.scan);
    scan.exclude_offsets = call.exclude_offsets;
    scan.exclude_ids = call.exclude_ids;
    scan.E = call.E;
    scan.reached = static_cast<Rank*>(call.workspace);
    scan.lists = scan.reached + call.B;
    scan.k = static_cast<int>(call.k);
    scan.sorted = static_cast<int>(plan.sorted);
    scan.splits = static_cast<int>(plan.scan.splits);
    scan.item_tiles = static_cast<int>(plan.scan.item_tiles);
    scan.stride = static_cast<int>(plan.stride);
    scan.step = static_cast<int>(plan.step);
    const dim3 grid(static_cast<unsigned>(plan.scan.query_tiles), static_cast<unsigned>(plan.scan.splits));
    device.clear(scan.reached, sizeof(Rank) * static_cast<std::size_t>(call.B));
    device.launch(call.plain ? topk_scan<true> : topk_scan<false>, grid, THREADS, plan.scan.shared_bytes, scan);
    const int merge_threads = static_cast<int>(plan.merge_warps) * WARP;
    device.launch(topk_merge, dim3(static_cast<unsigned>(call.B)), merge_threads, 0, scan, call.scores, call.ids);
}

}  // namespace lares_fast
