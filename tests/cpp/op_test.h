// The definition of a test of one op, and what all these tests share: random sizes and numbers, scores summed one by one,
// and failures. To add an op, add an OpTest in tests/cpp/<stem>.cpp and its name to OPS.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "simd/level.h"

namespace op_test {

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Random {
   public:
    explicit Random(std::uint64_t seed) : engine_(seed) {}

    // The bytes of a fuzzer decide while there are any, so that a change of one byte changes one decision. They must outlive
    // this object and its copies.
    Random(const std::uint8_t* bytes, std::size_t size) : engine_(size), next_(bytes), end_(bytes + size) {}

    // From first to last, both included.
    std::int64_t between(std::int64_t first, std::int64_t last) {
        if (next_ == end_) return std::uniform_int_distribution<std::int64_t>(first, last)(engine_);
        const std::uint64_t range = static_cast<std::uint64_t>(last) - static_cast<std::uint64_t>(first);
        std::uint64_t value = 0;
        for (std::uint64_t rest = range; rest > 0 && next_ != end_; rest >>= 8) value = value << 8 | *next_++;
        return static_cast<std::int64_t>(static_cast<std::uint64_t>(first) + (range + 1 ? value % (range + 1) : value));
    }
    bool chance(double share) {
        return next_ == end_ ? std::bernoulli_distribution(share)(engine_) : *next_++ < share * 256;
    }
    // Many numbers that depend on one decision: the bytes of a fuzzer would not suffice.
    Random bulk() { return Random(static_cast<std::uint64_t>(between(0, 0xFFFF))); }
    // Nearly normal: the sum of four uniform numbers of 16 bits. The library's own distribution took half of the program's
    // time.
    float normal() {
        const std::uint64_t bits = engine_();
        const std::uint64_t sum = (bits & 0xFFFF) + (bits >> 16 & 0xFFFF) + (bits >> 32 & 0xFFFF) + (bits >> 48);
        return (static_cast<float>(sum) - 2 * 65535.0f) * (1.7320508f / 65536.0f);
    }
    template <class T>
    T one_of(const std::vector<T>& values) {
        return values[static_cast<std::size_t>(between(0, static_cast<std::int64_t>(values.size()) - 1))];
    }

   private:
    std::mt19937_64 engine_;
    const std::uint8_t *next_ = nullptr, *end_ = nullptr;
};

// Exclusion lists in the form that the ops take: unsorted, with repeats.
struct Lists {
    std::vector<std::int64_t> offsets, ids;
};

// Queries, items, biases and exclusions, in memory of exactly their size.
struct Catalog {
    std::int64_t B, N, D;
    std::vector<float> query, items, bias;
    bool with_bias;
    Lists exclude;
    bool with_exclude;
    std::string kind;

    const float* bias_or_null() const { return with_bias ? bias.data() : nullptr; }
    const std::int64_t* offsets_or_null() const { return with_exclude ? exclude.offsets.data() : nullptr; }
    const std::int64_t* ids_or_null() const { return with_exclude ? exclude.ids.data() : nullptr; }

    // The contract of csrc/topk/topk.h: the bias first, then product by product, fused if the level has fused
    // multiply-adds.
    float score(std::int64_t b, std::int64_t item) const;
    // The scores of all items. NaN is -inf.
    std::vector<float> scores(std::int64_t b) const;
    bool excluded(std::int64_t b, std::int64_t item) const;
    std::string describe() const;
};

// Random sizes around the edges of tiles, panels and blocks. With `large` there are so many items that several threads get
// some.
Catalog random_catalog(Random& random, bool large);

// Queries and items only.
Catalog random_rows(Random& random, std::int64_t B, std::int64_t N, std::int64_t D);

// Whether `item` is above `target` in the order of csrc/target_rank/target_rank.h.
bool outranks(const std::vector<float>& scores, std::int64_t item, std::int64_t target, bool ties_by_id);

// Returns an id that is not an item.
std::int64_t bad_id(Random& random, std::int64_t N);

// Makes exclusion lists invalid. They must have at least one id.
void spoil_lists(Random& random, std::int64_t N, Lists& lists);

// One way to make a valid call invalid.
template <class Call>
struct Spoiler {
    const char* name;
    void (*spoil)(Call&);
};

inline void fail(const std::string& what) { throw Failure(what); }

template <class Run>
void must_throw(const char* op, const char* name, const Run& run) {
    try {
        run();
    } catch (const std::invalid_argument&) {
        return;
    }
    fail(std::string(op) + " accepted a call with " + name);
}

struct OpTest {
    const char* name;
    // A random valid call on `threads` threads. Its results are compared with the contract.
    void (*valid)(Random&, bool large, std::int64_t threads);
    // A random invalid call, which must throw std::invalid_argument.
    void (*invalid)(Random&);
};

extern const OpTest topk, build_index, target_rank, linear_cross_entropy, recurrence, masks, plans;
inline const OpTest* const OPS[] = {&topk, &build_index, &target_rank, &linear_cross_entropy, &recurrence, &masks, &plans};

// Whether features.h hides avx512vnni.
extern bool hide_vnni;

// Planted bugs that must end the program: a wrong order in the expectation, an output of linear_cross_entropy that is
// expected 0.1 % too large, a call with one item more than exists, and two calls that write one output.
extern bool ties_to_the_larger_id;
extern std::string too_large;
void read_beyond_the_items();
void write_one_output_twice();

// Prints a hash of the results of each op that a training step calls, over `calls` random calls.
void print_bits(std::int64_t calls, std::uint64_t seed);
// Forks `forks` times while other threads use the pool of memory. Each child uses it too.
void take_memory_after_forks(std::int64_t forks);

}  // namespace op_test
