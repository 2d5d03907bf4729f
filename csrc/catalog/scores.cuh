// Scores of a block's queries with tiles of items, in registers. Top-K and the target's rank use them.
#pragma once

#include <cfloat>
#include <cstdint>

#include "catalog/plan.h"
#include "cuda/device.cuh"

namespace lares_fast {

constexpr unsigned ALL_LANES = 0xffffffffu;
// A lane holds SUMS sums: LANE_ROWS queries times PAIRS pairs of neighbouring items.
constexpr int LANE_ROWS = WARP_QUERIES / 8;
constexpr int PAIRS = TILE_ITEMS / 8;
constexpr int ROW_SUMS = 2 * PAIRS;
constexpr int SUMS = LANE_ROWS * ROW_SUMS;
static_assert(SUMS == 64, "a lane's sums are addressed by the bits of one 64-bit word");

struct Scores {
    const float* query;  // [B, D]
    const float* items;  // [N, D]
    const float* bias;   // [N] or null
    std::int64_t N;
    int B, D, chunks;
    bool resident;
    bool vectors;  // rows start at multiples of 16 bytes
};

// Runs on the host.
template <class Call>
Scores make_scores(const Call& call, const ScanPlan& plan) {
    const bool vectors = call.D % 4 == 0 && reinterpret_cast<std::uintptr_t>(call.query) % 16 == 0 &&
                         reinterpret_cast<std::uintptr_t>(call.items) % 16 == 0;
    return {call.query, call.items, call.bias, call.N, static_cast<int>(call.B), static_cast<int>(call.D),
            static_cast<int>(plan.chunks), plan.resident, vectors};
}

// Where a lane's sums are in its warp's part of the score matrix. The accumulators of mma.m16n8k8 have this layout.
struct Lane {
    int lane, group, member;
    __device__ __forceinline__ Lane() : lane(static_cast<int>(threadIdx.x) % WARP), group(lane / 4), member(lane % 4) {}
    __device__ __forceinline__ int row(int i) const { return group + 8 * i; }
    __device__ __forceinline__ int column(int n) const { return 8 * (n / 2) + 2 * member + n % 2; }
};

// The items of one step: consecutive ones, or the listed ones.
struct Tile {
    const std::int64_t* ids;
    std::uint32_t first;
    int count;
    // Returns -1 if there is no item. An id out of range counts as no item, so that bad input never causes a read out of
    // bounds.
    __device__ __forceinline__ std::int64_t item(int row, std::int64_t N) const {
        if (row >= count) return -1;
        const std::int64_t id = ids ? ids[row] : std::int64_t{first} + row;
        return id < 0 || id >= N ? -1 : id;
    }
};

__device__ __forceinline__ Tile consecutive(int tile, std::int64_t N) {
    const std::int64_t first = std::int64_t{tile} * TILE_ITEMS, left = N - first;
    return {nullptr, static_cast<std::uint32_t>(first), left < TILE_ITEMS ? static_cast<int>(left) : TILE_ITEMS};
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) <= FLT_MAX; }

__device__ __forceinline__ float nan_to_lowest(float x) { return x == x ? x : -INFINITY; }

// The fp32 score without tensor cores. Splitting a value for the tensor cores turns infinity, and values that round to it,
// into NaN. Every score that is not finite is therefore computed again here.
__device__ inline float plain_score(const Scores& s, std::int64_t b, std::int64_t item) {
    const float *q = s.query + b * s.D, *x = s.items + item * s.D;
    float sum = s.bias ? s.bias[item] : 0.0f;
    // Whatever is added, the sum stays -inf or becomes NaN, which counts as -inf.
    if (sum == -INFINITY) return sum;
    count_slow("score computed again");
#pragma unroll 1
    for (int d = 0; d < s.D; ++d) sum = fmaf(q[d], x[d], sum);
    return nan_to_lowest(sum);
}

// The columns of a tile whose items have a bias of -inf, as bits over a lane's columns. The scores of such items are -inf.
__device__ __forceinline__ unsigned lowest_columns(const Scores& s, const Tile& tile, const Lane& lane) {
    if (!s.bias) return 0;
    unsigned long long lowest = 0;
#pragma unroll 1
    for (int half = 0; half < TILE_ITEMS / WARP; ++half) {
        const std::int64_t item = tile.item(half * WARP + lane.lane, s.N);
        const bool is_lowest = item >= 0 && s.bias[item] == -INFINITY;
        lowest |= static_cast<unsigned long long>(__ballot_sync(ALL_LANES, is_lowest)) << half * WARP;
    }
    unsigned columns = 0;
    if (lowest) {
#pragma unroll 1
        for (int n = 0; n < ROW_SUMS; ++n) columns |= static_cast<unsigned>(lowest >> lane.column(n) & 1) << n;
    }
    return columns;
}

// Returns `sums`, bits over a lane's sums, without the sums that need not be computed again. Such sums belong to queries that
// do not exist, or to items with a bias of -inf where that score loses. Lane i has the `least` score that counts for query i.
__device__ __forceinline__ unsigned long long worth_a_look(unsigned long long sums, const Scores& s, const Tile& tile, const Lane& lane,
                                                           int first_query, float least) {
    if (!__any_sync(ALL_LANES, sums != 0)) return 0;
    const unsigned lowest = lowest_columns(s, tile, lane);
#pragma unroll 1
    for (int i = 0; i < LANE_ROWS; ++i) {
        const bool real = first_query + lane.row(i) < s.B, lowest_loses = __shfl_sync(ALL_LANES, least, lane.row(i)) > -INFINITY;
        const unsigned long long never = real ? (lowest_loses ? lowest : 0) : (1u << ROW_SUMS) - 1;
        sums &= ~(never << i * ROW_SUMS);
    }
    return sums;
}

// The excluded items of one query. The list is not valid if its offsets are not within the E ids, if its first or last id
// is not an item, or if it has 2^32 ids or more. `ids` and `count` are always safe to read.
struct ExcludedItems {
    const std::int64_t* ids;
    std::uint32_t count;
    bool valid;
};

__device__ __forceinline__ ExcludedItems excluded_items(const std::int64_t* offsets, const std::int64_t* ids, std::int64_t E,
                                                        std::int64_t query, std::int64_t N) {
    if (!offsets) return {ids, 0, true};
    const std::int64_t from = offsets[query], to = offsets[query + 1];
    if (from < 0 || from > to || to > E || to - from > 0xffffffffll) return {ids, 0, false};
    return {ids + from, static_cast<std::uint32_t>(to - from), from == to || (ids[from] >= 0 && ids[to - 1] < N)};
}

// Returns sums[index] without an array in local memory.
template <int FIRST = 0, int LAST = SUMS>
__device__ __forceinline__ float pick(const float (&sums)[SUMS], int index) {
    if constexpr (LAST - FIRST == 1) {
        return sums[FIRST];
    } else {
        constexpr int MIDDLE = (FIRST + LAST) / 2;
        const float low = pick<FIRST, MIDDLE>(sums, index), high = pick<MIDDLE, LAST>(sums, index);
        return index < MIDDLE ? low : high;
    }
}

// The place of an element in rows of CHUNK floats in shared memory. The pieces of 16 bytes are permuted, so that neither
// the 8-byte loads of a column pair nor the 16-byte stores of a row cause bank conflicts.
__device__ __forceinline__ int place(int row, int d) { return row * CHUNK + (((d / 4) ^ (row % 4 * 2)) * 4 + d % 4); }

template <int ROWS, class Row>
__device__ __forceinline__ void start_rows(float* to, const float* table, const Scores& s, int chunk, const Row& row_of) {
    const int d0 = chunk * CHUNK;
    if (s.vectors) {
#pragma unroll 1
        for (int p = threadIdx.x; p < ROWS * (CHUNK / 4); p += THREADS) {
            const int row = p / (CHUNK / 4), d = p % (CHUNK / 4) * 4;
            const std::int64_t source = row_of(row);
            const bool real = source >= 0 && d0 + d < s.D;
            start_copy<16>(to + place(row, d), real ? table + source * s.D + d0 + d : table, real);
        }
    } else {
#pragma unroll 1
        for (int p = threadIdx.x; p < ROWS * CHUNK; p += THREADS) {
            const int row = p / CHUNK, d = p % CHUNK;
            const std::int64_t source = row_of(row);
            const bool real = source >= 0 && d0 + d < s.D;
            start_copy<4>(to + place(row, d), real ? table + source * s.D + d0 + d : table, real);
        }
    }
}

// x = high + low, each with 11 significant bits, with an error of up to 2^-23 |x|.
__device__ __forceinline__ void split(float x, std::uint32_t& high, std::uint32_t& low) {
    high = round_to_tf32(x);
    low = round_to_tf32(x - __uint_as_float(high));
}

// Adds the products of one chunk by tensor cores. `query` has the block's rows, and `first_row` is the warp's first one.
// Eight products are summed on their own and then added, because tensor cores truncate their sums.
__device__ __forceinline__ void multiply_tensor(const float* query, int first_row, const float* items, int depth, const Lane& lane,
                                                float (&sums)[SUMS]) {
#pragma unroll 1
    for (int d = 0; d < depth; d += 8) {
        // The columns k and k + 4 of a fragment hold the dimensions 2k and 2k + 1. The sum does not change, and the two
        // values are neighbours in memory.
        const int column = d + 2 * lane.member;
        std::uint32_t q_high[2][4], q_low[2][4];
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 q = *reinterpret_cast<const float2*>(query + place(first_row + 16 * m + 8 * half + lane.group, column));
                split(q.x, q_high[m][half], q_low[m][half]);
                split(q.y, q_high[m][half + 2], q_low[m][half + 2]);
            }
        }
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
            const float2 x = *reinterpret_cast<const float2*>(items + place(8 * j + lane.group, column));
            std::uint32_t x_high[2], x_low[2];
            split(x.x, x_high[0], x_low[0]);
            split(x.y, x_high[1], x_low[1]);
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                float step[4] = {};
                mma_tf32(step, q_low[m], x_high);
                mma_tf32(step, q_high[m], x_low);
                mma_tf32(step, q_high[m], x_high);
#pragma unroll
                for (int r = 0; r < 4; ++r) sums[(2 * m + r / 2) * ROW_SUMS + 2 * j + r % 2] += step[r];
            }
        }
    }
}

// Adds the products of one chunk one after the other in the order of D, with the bits of the CPU kernels.
__device__ __forceinline__ void multiply_plain(const float* query, int first_row, const float* items, int depth, const Lane& lane,
                                               float (&sums)[SUMS]) {
#pragma unroll 1
    for (int d = 0; d < depth; d += 4) {
        float4 q[LANE_ROWS];
#pragma unroll
        for (int i = 0; i < LANE_ROWS; ++i) q[i] = *reinterpret_cast<const float4*>(query + place(first_row + lane.row(i), d));
#pragma unroll
        for (int n = 0; n < ROW_SUMS; ++n) {
            const float4 x = *reinterpret_cast<const float4*>(items + place(lane.column(n), d));
#pragma unroll
            for (int i = 0; i < LANE_ROWS; ++i) {
                float& sum = sums[i * ROW_SUMS + n];
                sum = fmaf(q[i].x, x.x, sum);
                sum = fmaf(q[i].y, x.y, sum);
                sum = fmaf(q[i].z, x.z, sum);
                sum = fmaf(q[i].w, x.w, sum);
            }
        }
    }
}

// Shared memory of a block: chunks of queries, two stages of items and of their biases, and one word a query. Returns the
// words.
__device__ __forceinline__ int* query_words(const Scores& s) {
    float* const query = reinterpret_cast<float*>(shared_memory());
    return reinterpret_cast<int*>(query + (s.resident ? s.chunks : 2) * (TILE_QUERIES * CHUNK) + 2 * TILE_ITEMS * (CHUNK + 1));
}

// Computes the scores of the block's queries with `tiles` tiles of items, and calls `use(tile, sums)` for each tile in the
// warps that have queries. Tiles are numbered: `first` is the first number, `after(number)` the next one, and
// `tile_of(number)` returns the tile. The next chunk is copied while one is computed.
template <bool PLAIN, class After, class TileOf, class Use>
__device__ __forceinline__ void for_each_tile(const Scores& s, int tiles, int first, After&& after, TileOf&& tile_of, Use&& use) {
    float* const query = reinterpret_cast<float*>(shared_memory());
    float* const items = query + (s.resident ? s.chunks : 2) * (TILE_QUERIES * CHUNK);
    float* const bias = items + 2 * (TILE_ITEMS * CHUNK);
    const Lane lane;
    const int first_query = static_cast<int>(blockIdx.x) * TILE_QUERIES;
    const int first_row = static_cast<int>(threadIdx.x) / WARP * WARP_QUERIES;
    int stage = 0;
    // Starts the copy of chunk `chunk` of the n-th tile.
    const auto load = [&](int number, int n, int chunk, int to) {
        const Tile tile = tile_of(number);
        if (!s.resident || n == 0) {
            start_rows<TILE_QUERIES>(query + (s.resident ? chunk : to) * (TILE_QUERIES * CHUNK), s.query, s, chunk, [&](int row) {
                return std::int64_t{first_query + row < s.B ? first_query + row : -1};
            });
        }
        start_rows<TILE_ITEMS>(items + to * (TILE_ITEMS * CHUNK), s.items, s, chunk, [&](int row) { return tile.item(row, s.N); });
        if (s.bias && chunk == 0 && threadIdx.x < TILE_ITEMS) {
            const int row = static_cast<int>(threadIdx.x);
            const std::int64_t item = tile.item(row, s.N);
            start_copy<4>(bias + n % 2 * TILE_ITEMS + row, item < 0 ? s.bias : s.bias + item, item >= 0);
        }
    };
    int ahead = first;
    if (tiles > 0) load(ahead, 0, 0, stage);
    for (int n = 0; n < tiles; ++n) {
        const int now = ahead;
        if (n + 1 < tiles) ahead = after(now);
        float sums[SUMS];
        for (int chunk = 0; chunk < s.chunks; ++chunk) {
            finish_copies();
            // Now the copies of all threads have arrived, and no thread reads the other stage any more.
            __syncthreads();
            const bool last = chunk + 1 == s.chunks;
            if (!last || n + 1 < tiles) load(last ? ahead : now, last ? n + 1 : n, last ? 0 : chunk + 1, stage ^ 1);
            if (chunk == 0) {
#pragma unroll
                for (int column = 0; column < ROW_SUMS; ++column) {
                    const float start = s.bias ? bias[n % 2 * TILE_ITEMS + lane.column(column)] : 0.0f;
#pragma unroll
                    for (int i = 0; i < LANE_ROWS; ++i) sums[i * ROW_SUMS + column] = start;
                }
            }
            if (first_query + first_row < s.B) {
                const float* const q = query + (s.resident ? chunk : stage) * (TILE_QUERIES * CHUNK);
                const float* const x = items + stage * (TILE_ITEMS * CHUNK);
                const int left = s.D - chunk * CHUNK, depth = left < CHUNK ? left : CHUNK;
                if constexpr (PLAIN) {
                    multiply_plain(q, first_row, x, depth, lane, sums);
                } else {
                    multiply_tensor(q, first_row, x, depth, lane, sums);
                }
            }
            stage ^= 1;
        }
        if (first_query + first_row < s.B) use(tile_of(now), sums);
    }
}

}  // namespace lares_fast
