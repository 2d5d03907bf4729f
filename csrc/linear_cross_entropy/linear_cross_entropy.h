// Log-probability of a target under a softmax over the whole item table, and its gradients.
#pragma once

#include <cstdint>

namespace lares_fast {

// The softmax: row m gives item j the probability exp(scale s_mj) / sum_i exp(scale s_mi), s = hidden items^T. With
// skip_pad item 0 is no part of it.
struct Softmax {
    const float* hidden;         // [M, D]
    const float* items;          // [N, D]
    const std::int64_t* target;  // [M], in [skip_pad, N)
    std::int64_t M, N, D;
    double scale;                // positive and finite
    bool skip_pad;
};

// logprob[m] = log of the target's probability, lse[m] = log sum_i exp(scale s_mi), and unless rank is null rank[m] = the items
// of the softmax that outrank the target, as in target_rank.h. A score s has the bits of topk.
// A sum of exponentials is relative to a score of its row, in fp32 over 64 panels and in fp64 over those, and
// leaves the target's own term out: logprob = -log1p(others / own). The same bits for every `threads`.
struct TargetLogprob {
    Softmax softmax;
    float* logprob;      // [M]
    double* lse;         // [M]
    std::int64_t* rank;  // [M] or null
    bool ties_by_id;
};

// Gradients of sum_m grad[m] logprob[m]. A row whose lse is not finite makes d_hidden[m] and all of d_items NaN.
// Sums have a fixed order: the same bits for every `threads`.
struct TargetLogprobBackward {
    Softmax softmax;
    const float* grad;  // [M]
    const double* lse;  // [M]
    float* d_hidden;    // [M, D] or null
    float* d_items;     // [N, D] or null
};

// Throw std::invalid_argument where a size, pointer, scale or target is out of range.
//
// Workspace of the first: 12 bytes a row and part of the catalog (at most 16 parts), and a thread a panel of items and
// M * 100 bytes, M at most 1024. Of the second: M * D floats for each part, M at most 4096, and a thread under 1 MiB at D = 64.
void target_logprob_cpu(const TargetLogprob& call, std::int64_t threads);
void target_logprob_backward_cpu(const TargetLogprobBackward& call, std::int64_t threads);

}  // namespace lares_fast
