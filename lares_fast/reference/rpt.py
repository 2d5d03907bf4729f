"""Loss of phase 2, reinforcement post-training: ranking rewards of G noisy trajectories for each sequence, and a KL term."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast._transfer import to_device
from lares_fast.reference.model import LARES
from lares_fast.reference.spt import Pair, Pass

REWARDS = ("recall", "ndcg")
SCORES = ("dot", "model")


class RPTLoss(NamedTuple):
    """The loss of phase 2.

    ``total`` is a scalar. ``rewards`` and ``advantages`` are [G, B]. ``kl`` is a scalar: the mean of k3, without the factor
    ``beta``.
    """

    total: Tensor
    rewards: Tensor
    advantages: Tensor
    kl: Tensor


def ranking_reward(rank: Tensor, k: int, kind: str) -> Tensor:
    """Return the rewards [...] (fp32) of ranks [...] that count from 0.

    A rank below ``k`` gets 1 if ``kind`` is ``recall``, and 1 / log2(rank + 2) if it is ``ndcg``. Any other rank gets 0.
    """
    gain = 1 / torch.log2(rank + 2.0) if kind == "ndcg" else torch.ones_like(rank, dtype=torch.float32)
    return torch.where(rank < k, gain, 0.0)


def group_advantage(rewards: Tensor) -> Tensor:
    """Return ``(r - mean) / (std + 1e-4)`` over the group [G, B], with the unbiased standard deviation."""
    return (rewards - rewards.mean(dim=0)) / (rewards.std(dim=0) + 1e-4)


def rpt_loss(
    policy: LARES,
    reference: LARES,
    sequences: Pair,
    target: Tensor,
    policy_pass: Pass,
    reference_pass: Pass,
    *,
    k: int,
    beta: float,
    reward: str,
    scores: str = "dot",
) -> RPTLoss:
    """Return the loss of the official RPT trainer.

    ``-mean over members and rows of mean over steps of [A exp(lp - sg(lp)) - beta k3]``, where sg stops the gradient,

    - lp is log p(target) after a step,
    - k3 is ``exp(r) - r - 1`` with ``r = lp_reference - lp``,
    - A is the advantage within the group, from the rank of the target after the last step. The ranking has every row of the
      item table, PAD included, and ties count in the target's favour.

    ``sequences``, ``target``
        B sequences in a form that :meth:`LARES.encode` takes, and the next item of each sequence, int64 [B].
    ``policy_pass``, ``reference_pass``
        G passes each, with equal ``num_steps`` [G, B].
    ``k``, ``reward``
        The reward is ``recall`` or ``ndcg`` of the first ``k``, see :func:`ranking_reward`.
    ``scores``
        ``dot`` (official): lp and the ranks come from plain dot products, even if the model uses cosine similarity. ``model``:
        lp and the ranks come from the scores by which the model ranks.

    No gradient flows into ``reference`` or A. Raises :class:`InputError` for unknown names and for fewer than two passes.
    """
    for name, value, allowed in (("reward", reward, REWARDS), ("scores", scores, SCORES)):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}.")
    # All sizes follow from the depths. The depths are on the CPU, so that the CPU does not wait for a GPU.
    num_steps = torch.as_tensor(policy_pass.num_steps).cpu()
    if num_steps.dim() != 2 or len(num_steps) < 2:
        raise InputError(
            f"num_steps must be [G, B] with G at least 2, for advantages within a group, but is {list(num_steps.shape)}."
        )
    depth = num_steps.flatten()
    order, owner, steps = (to_device(x, target.device) for x in _last_steps_behind(depth))
    wanted = target.repeat(len(num_steps))[owner]
    earlier = len(order) - len(depth)

    def queries_and_items(model: LARES, trajectories: Pass) -> tuple[Tensor, Tensor]:
        states = trajectories.trajectories(model, sequences)[order]
        return (model.queries(states), model.item_table()) if scores == "model" else (states, model.item_embedding.weight)

    queries, items = queries_and_items(policy, policy_pass)
    before = policy.head.target_logprob(queries[:earlier], items, wanted[:earlier])
    after, rank = policy.head.target_logprob_and_rank(queries[earlier:], items, wanted[earlier:], ties="strict")
    logprob = torch.cat((before, after))
    with torch.no_grad():
        frozen = reference.head.target_logprob(*queries_and_items(reference, reference_pass), wanted)

    rewards = ranking_reward(rank, k, reward).reshape(num_steps.shape)
    advantages = group_advantage(rewards)
    ratio = frozen - logprob
    k3 = ratio.exp() - ratio - 1
    gain = advantages.flatten()[owner] * (logprob - logprob.detach()).exp()

    def mean(value: Tensor) -> Tensor:
        return (value / steps).sum() / len(depth)

    return RPTLoss(-mean(gain - beta * k3), rewards, advantages, mean(k3.detach()))


def _last_steps_behind(depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return an order of the states of trajectories with ``depth`` [G * B] that puts all last steps at the end.

    Ranks are counted for the last steps only, and in this order they are one slice. Returns ``(order, owner, steps)``, each
    [sum of depth]: in this order the index of each state, its trajectory, and the depth of that trajectory.
    """
    member = torch.repeat_interleave(torch.arange(len(depth)), depth)
    last = depth.cumsum(0) - 1
    earlier = torch.ones_like(member).index_fill(0, last, 0).nonzero().squeeze(1)
    order = torch.cat((earlier, last))
    return order, member[order], depth[member[order]]
