"""Loss of phase 2, reinforcement post-training: ranking rewards of G noisy trajectories for each sequence, and a KL term."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast._errors import InputError
from lares_fast._transfer import to_device
from lares_fast.config import REWARDS, SCORES
from lares_fast.reference.model import LARES
from lares_fast.reference.spt import Pair, Pass


class RPTLoss(NamedTuple):
    """The loss of phase 2.

    ``total`` is a scalar. ``rewards`` and ``advantages`` are [G, B]. ``kl`` is a scalar: the mean of k3, without the factor
    ``beta``.
    """

    total: Tensor
    rewards: Tensor
    advantages: Tensor
    kl: Tensor


class RPTRows(NamedTuple):
    """Which states of G trajectories over B sequences the loss reads, M in all; made by :func:`rpt_rows`.

    ``order``
        [M] int64: the row of each state in the result of :meth:`LARES.trajectories`. The G * B last states come first, then the
        states of earlier steps.
    ``owner``
        [M] int64: the trajectory of each state, in 0..G * B - 1.
    ``weight``
        [M] fp64: 1 / the depth of the trajectory. A state with weight 0 does not count.
    """

    order: Tensor
    owner: Tensor
    weight: Tensor


def rpt_rows(num_steps: Tensor, first: Tensor | None = None, size: int | None = None) -> RPTRows:
    """Return the tables for depths ``num_steps`` [G, B], which are on the CPU.

    ``first`` [G, B] is the row of each trajectory's first state. The default is the order of :meth:`LARES.trajectories`.
    ``size`` is the number M of rows, at least the sum of the depths (the default). Rows after that sum have weight 0.
    """
    depth = num_steps.flatten()
    count = len(depth)
    begin = depth.cumsum(0) - depth if first is None else first.flatten()
    owner = torch.repeat_interleave(torch.arange(count), depth - 1)
    place = torch.arange(len(owner)) - ((depth - 1).cumsum(0) - (depth - 1))[owner]
    order = torch.cat((begin + depth - 1, begin[owner] + place))
    owner = torch.cat((torch.arange(count), owner))
    filler = 0 if size is None else size - len(order)
    if filler < 0:
        raise InputError(f"size must be at least {len(order)}, the sum of num_steps, but got {size}.")
    weight = (1 / depth.double())[owner]
    # A filler reads a state that exists, so that its numbers are finite.
    return RPTRows(*(F.pad(x, (0, filler), value=value) for x, value in ((order, int(order[0])), (owner, 0), (weight, 0))))


def ranking_reward(rank: Tensor, k: int, kind: str) -> Tensor:
    """Return the rewards [...] (fp32) of ranks [...] that count from 0.

    A rank below ``k`` gets 1 if ``kind`` is ``recall``, and 1 / log2(rank + 2) if it is ``ndcg``. Any other rank gets 0.
    """
    hit = (rank < k).float()
    return hit / torch.log2(rank + 2.0) if kind == "ndcg" else hit


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
    rows: RPTRows | None = None,
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
    ``rows``
        The tables of :func:`rpt_rows`, on the device of ``target``. They are needed if ``num_steps`` is on a GPU, and if the
        passes have more sequences than ``target``. The loss then reads the states that they name.

    No gradient flows into ``reference`` or A. Raises :class:`InputError` for unknown names and for fewer than two passes.
    """
    for name, value, allowed in (("reward", reward, REWARDS), ("scores", scores, SCORES)):
        if value not in allowed:
            raise InputError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}.")
    num_steps = torch.as_tensor(policy_pass.num_steps)
    if num_steps.dim() != 2 or len(num_steps) < 2:
        raise InputError(
            f"num_steps must be [G, B] with G at least 2, for advantages within a group, but is {list(num_steps.shape)}."
        )
    # The depths are on the CPU, so that the CPU does not wait for a GPU.
    order, owner, weight = rows or (to_device(x, target.device) for x in rpt_rows(num_steps.cpu()))
    group, batch = len(num_steps), len(target)
    wanted, ranked = target.repeat(group)[owner], group * batch

    def queries_and_items(model: LARES, trajectories: Pass) -> tuple[Tensor, Tensor]:
        states = trajectories.trajectories(model, sequences)[order]
        return (model.queries(states), model.item_table()) if scores == "model" else (states, model.item_embedding.weight)

    queries, items = queries_and_items(policy, policy_pass)
    logprob, rank = policy.head.target_logprob_and_rank(queries, items, wanted, ties="strict", ranked=ranked)
    with torch.no_grad():
        frozen = reference.head.target_logprob(*queries_and_items(reference, reference_pass), wanted)

    rewards = ranking_reward(rank, k, reward).reshape(group, batch)
    advantages = group_advantage(rewards)
    ratio = frozen - logprob
    k3 = ratio.expm1() - ratio
    gain = advantages.flatten()[owner] * (logprob - logprob.detach()).exp()
    # The sums are in fp64, so that rows of weight 0 do not change how they round.
    means = (torch.stack((gain, k3)) * weight).sum(1) / ranked
    mean_gain, kl = means.to(gain.dtype).unbind()
    return RPTLoss(beta * kl - mean_gain, rewards, advantages, kl.detach())
