"""Phase 2, reinforcement post-training: G noisy trajectories a sequence, ranking rewards, group advantages, KL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lares_fast.reference.model import LARES
from lares_fast.reference.spt import Pass, Sequences

REWARDS = ("recall", "ndcg")


class RPTLoss(NamedTuple):
    """``total`` scalar; ``rewards`` and ``advantages`` [G, B]; ``kl`` scalar, the mean k3 term before beta."""

    total: Tensor
    rewards: Tensor
    advantages: Tensor
    kl: Tensor


def ranking_reward(rank: Tensor, k: int, kind: str) -> Tensor:
    """Reward of 0-based ranks: ``recall`` is 1 inside the first k, ``ndcg`` is 1 / log2(rank + 2) there, else 0."""
    gain = 1 / torch.log2(rank + 2.0) if kind == "ndcg" else torch.ones(rank.shape)
    return torch.where(rank < k, gain, 0.0)


def group_advantage(rewards: Tensor) -> Tensor:
    """``(r - mean) / (std + 1e-4)`` over the group [G, B], with the unbiased standard deviation."""
    return (rewards - rewards.mean(dim=0)) / (rewards.std(dim=0) + 1e-4)


def rpt_loss(
    policy: LARES,
    reference: LARES,
    sequences: Sequences,
    target: Tensor,
    policy_passes: Sequence[Pass],
    reference_passes: Sequence[Pass],
    *,
    k: int,
    beta: float,
    reward: str,
) -> RPTLoss:
    """``-mean over members and rows of mean over steps of [A exp(lp - sg(lp)) - beta k3]`` (official RPT trainer).

    lp [B, T] is log p(target) after each step, always by plain dot products; ``k3 = exp(r) - r - 1`` with
    ``r = lp_reference - lp``; A is the group's advantage of the last step's rank over every row of the
    table, PAD included and ties in the target's favour. No gradient flows into ``reference`` or A.
    """
    items = policy.item_embedding.weight
    logprobs, rewards = [], []
    for policy_pass in policy_passes:
        states = policy_pass.encode(policy, sequences, return_all_steps=True)
        steps = target[:, None].expand(states.shape[:2])
        logprob, rank = policy.target_logprob_and_rank(states, items, steps, ties="strict")
        logprobs.append(logprob)
        rewards.append(ranking_reward(rank[:, -1], k, reward))
    group_rewards = torch.stack(rewards)
    advantages = group_advantage(group_rewards)

    objectives, kls = [], []
    for member, logprob in enumerate(logprobs):
        with torch.no_grad():
            states = reference_passes[member].encode(reference, sequences, return_all_steps=True)
            steps = target[:, None].expand(states.shape[:2])
            frozen = reference.target_logprob(states, reference.item_embedding.weight, steps)
        ratio = frozen - logprob
        k3 = ratio.exp() - ratio - 1
        gain = advantages[member][:, None] * (logprob - logprob.detach()).exp()
        own = _own_steps(policy_passes[member].num_steps, logprob)
        objectives.append(((gain - beta * k3) * own).sum(dim=1) / own.sum(dim=1))
        kls.append(((k3 * own).sum(dim=1) / own.sum(dim=1)).detach())
    return RPTLoss(-torch.stack(objectives).mean(), group_rewards, advantages, torch.stack(kls).mean())


def _own_steps(num_steps: int | Tensor, logprob: Tensor) -> Tensor:
    """[B, T] 1 where the step is one of the sequence's own, 0 where a deeper sequence is still running."""
    depth = torch.as_tensor(num_steps, device=logprob.device).expand(len(logprob))
    return (torch.arange(logprob.shape[1], device=logprob.device) < depth[:, None]).to(logprob.dtype)
