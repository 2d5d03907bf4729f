"""Phase 2, reinforcement post-training: G noisy trajectories a sequence, ranking rewards, group advantages, KL."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._transfer import to_device
from lares_fast.reference.model import LARES
from lares_fast.reference.spt import Pass, Sequences

REWARDS = ("recall", "ndcg")
SCORES = ("dot", "model")


class RPTLoss(NamedTuple):
    """``total`` scalar; ``rewards`` and ``advantages`` [G, B]; ``kl`` scalar, the mean k3 term before beta."""

    total: Tensor
    rewards: Tensor
    advantages: Tensor
    kl: Tensor


def ranking_reward(rank: Tensor, k: int, kind: str) -> Tensor:
    """Reward of 0-based ranks: ``recall`` is 1 inside the first k, ``ndcg`` is 1 / log2(rank + 2) there, else 0."""
    gain = 1 / torch.log2(rank + 2.0) if kind == "ndcg" else torch.ones_like(rank, dtype=torch.float32)
    return torch.where(rank < k, gain, 0.0)


def group_advantage(rewards: Tensor) -> Tensor:
    """``(r - mean) / (std + 1e-4)`` over the group [G, B], with the unbiased standard deviation."""
    return (rewards - rewards.mean(dim=0)) / (rewards.std(dim=0) + 1e-4)


def rpt_loss(
    policy: LARES,
    reference: LARES,
    sequences: Sequences,
    target: Tensor,
    policy_pass: Pass,
    reference_pass: Pass,
    *,
    k: int,
    beta: float,
    reward: str,
    scores: str = "dot",
) -> RPTLoss:
    """``-mean over members and rows of mean over steps of [A exp(lp - sg(lp)) - beta k3]`` (official RPT trainer).

    Both passes have the same ``num_steps`` [G, B]. lp is log p(target) after a step, by plain dot products whatever the
    model's similarity (official), or with ``scores="model"`` by what the model ranks by; ``k3 = exp(r) - r - 1`` with
    ``r = lp_reference - lp``; A is the group's advantage of the last step's rank, by the same scores, over every row of the
    table, PAD included and ties in the target's favour. No gradient flows into ``reference`` or A.
    """
    for name, value, allowed in (("reward", reward, REWARDS), ("scores", scores, SCORES)):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}.")
    # All sizes follow from the depths, which are on the CPU as in ``trajectories``: nothing waits for a GPU.
    num_steps = torch.as_tensor(policy_pass.num_steps).cpu()
    if num_steps.dim() != 2 or len(num_steps) < 2:
        raise InputError(
            f"num_steps must be [G, B] with G at least 2, for advantages within a group, but is {list(num_steps.shape)}."
        )
    depth = num_steps.flatten()
    member = torch.repeat_interleave(torch.arange(len(depth)), depth)
    last = depth.cumsum(0) - 1
    # Ranks are counted after the last steps only, which therefore stand behind all others.
    earlier = torch.ones_like(member).index_fill(0, last, 0).nonzero().squeeze(1)
    order = torch.cat((earlier, last))
    owner, steps = member[order], depth[member[order]]
    order, owner, steps = (to_device(x, target.device) for x in (order, owner, steps))
    wanted = target.repeat(len(num_steps))[owner]
    count = len(earlier)

    def queries_and_items(model: LARES, trajectories: Pass) -> tuple[Tensor, Tensor]:
        states = trajectories.trajectories(model, sequences)[order]
        return model.query_and_items(states) if scores == "model" else (states, model.item_embedding.weight)

    queries, items = queries_and_items(policy, policy_pass)
    before = policy.target_logprob(queries[:count], items, wanted[:count])
    after, rank = policy.target_logprob_and_rank(queries[count:], items, wanted[count:], ties="strict")
    logprob = torch.cat((before, after))
    with torch.no_grad():
        frozen = reference.target_logprob(*queries_and_items(reference, reference_pass), wanted)

    rewards = ranking_reward(rank, k, reward).reshape(num_steps.shape)
    advantages = group_advantage(rewards)
    ratio = frozen - logprob
    k3 = ratio.exp() - ratio - 1
    gain = advantages.flatten()[owner] * (logprob - logprob.detach()).exp()

    def mean(value: Tensor) -> Tensor:
        return (value / steps).sum() / len(depth)

    return RPTLoss(-mean(gain - beta * k3), rewards, advantages, mean(k3.detach()))
