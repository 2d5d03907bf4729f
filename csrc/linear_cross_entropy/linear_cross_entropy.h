// The log-probability of a target under a softmax over the whole item table, and its gradients.
#pragma once

#include <cstdint>

namespace lares_fast {

// Row m gives item j the probability exp(scale s_mj) / sum_i exp(scale s_mi), where s = hidden items^T. With skip_pad the
// softmax leaves out item 0.
struct Softmax {
    const float* hidden;         // [M, D]
    const float* items;          // [N, D]
    const std::int64_t* target;  // [M], in [skip_pad, N)
    std::int64_t M, N, D;
    double scale;                // positive and finite
    bool skip_pad;
};

// logprob[m] is the log of the target's probability. lse[m] is the log-sum-exp as two numbers: a score r, which is at least the
// target's, and log sum_i exp(scale (s_mi - r)). Their sum would lose the digits of the logarithm where scores are large.
// Unless rank is null, rank[m] is the number of items of the softmax that outrank the target, as in target_rank.h. A score s
// has the bits of topk. Each exponential is relative to a score of its row. The sums are fp32 over 64 panels and fp64 beyond,
// and leave out the target's own term: logprob = -log1p(others / own). The number of threads changes no bit.
struct TargetLogprob {
    Softmax softmax;
    float* logprob;      // [M]
    double* lse;         // [M, 2]
    std::int64_t* rank;  // [M] or null
    bool ties_by_id;
};

// The gradients of sum_m grad[m] logprob[m]. A row with a number of lse that is not finite makes d_hidden[m] and all of d_items NaN.
// Sums have a fixed order, so the number of threads changes no bit.
struct TargetLogprobBackward {
    Softmax softmax;
    const float* grad;  // [M]
    const double* lse;  // [M, 2]
    float* d_hidden;    // [M, D] or null
    float* d_items;     // [N, D] or null
};

// Both throw std::invalid_argument if a size, pointer, scale or target is out of range. Workspace of target_logprob_cpu: 12
// bytes for each row and part of the catalog (at most 16 parts). Each thread also needs a panel of items and M * 100 bytes,
// with M at most 1024. Workspace of target_logprob_backward_cpu: M * D floats for each part, with M at most 4096. Each
// thread also needs less than 1 MiB at D = 64.
void target_logprob_cpu(const TargetLogprob& call, std::int64_t threads);
void target_logprob_backward_cpu(const TargetLogprobBackward& call, std::int64_t threads);

}  // namespace lares_fast
