// Hashes of the results of the ops that a training step calls. Two machines whose hashes are equal compute the same bits.
#include <cstdio>

#include "linear_cross_entropy/linear_cross_entropy.h"
#include "op_test.h"
#include "recurrence_case.h"

namespace op_test {
namespace {

// FNV-1a.
class Hash {
   public:
    template <class T>
    void add(const std::vector<T>& values) {
        const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
        for (std::size_t i = 0; i < values.size() * sizeof(T); ++i) value_ = (value_ ^ bytes[i]) * 0x100000001B3u;
    }
    void print(const char* name) const { std::printf("%s %016llx\n", name, static_cast<unsigned long long>(value_)); }

   private:
    std::uint64_t value_ = 0xCBF29CE484222325u;
};

std::vector<float> normal(Random& random, std::int64_t n) {
    std::vector<float> values(place(n));
    for (float& value : values) value = random.normal();
    return values;
}

}  // namespace

void print_bits(std::int64_t calls, std::uint64_t seed) {
    Random random(seed);
    Hash logprob, rank, gradient, states, state_gradient;
    for (std::int64_t call = 0; call < calls; ++call) {
        const std::int64_t M = random.between(1, 40), N = random.between(2, 700), D = 16 * random.between(1, 4);
        const std::vector<float> hidden = normal(random, M * D), items = normal(random, N * D), grad = normal(random, M);
        std::vector<std::int64_t> target(place(M)), ranks(place(M));
        for (std::int64_t& t : target) t = random.between(1, N - 1);
        std::vector<float> own(place(M)), d_hidden(hidden.size()), d_items(items.size());
        std::vector<double> lse(place(2 * M));
        const lares_fast::Softmax softmax{hidden.data(), items.data(), target.data(), M, N, D, 0.3, true};
        lares_fast::target_logprob_cpu({softmax, own.data(), lse.data(), ranks.data(), true}, 1);
        lares_fast::target_logprob_backward_cpu({softmax, grad.data(), lse.data(), d_hidden.data(), d_items.data()}, 1);
        logprob.add(own), logprob.add(lse), rank.add(ranks), gradient.add(d_hidden), gradient.add(d_items);

        const Case test(random, false);
        Results results(test);
        Call both(test, results);
        both.forward(1), both.backward(1);
        states.add(results.out), state_gradient.add(results.h_grad), state_gradient.add(results.pre_grad);
        for (const Tensor& weight : results.weight_grads) state_gradient.add(weight);
    }
    logprob.print("cross_entropy"), rank.print("rank"), gradient.print("cross_entropy_backward");
    states.print("recurrence"), state_gradient.print("recurrence_backward");
}

}  // namespace op_test
