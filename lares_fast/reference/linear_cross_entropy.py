"""Log-probabilities and cross entropy of targets under a softmax over the whole item table."""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast._numbers import choice
from lares_fast.reference.target_rank import outranking
from lares_fast.sequences import PAD

REDUCTIONS = ("none", "mean", "sum")


def target_logprob(hidden: Tensor, items: Tensor, target: Tensor, *, scale: float = 1.0, skip_pad: bool = False) -> Tensor:
    """Return ``log_softmax(scale * hidden @ items.T)[..., target]``: the log-probability of each target.

    ``hidden`` is [..., D], ``items`` [N, D] and ``target`` [...] int64. The result is [...]. If ``items`` is [J, N, D], there
    are J catalogs: ``hidden`` is [J, M, D] and ``target`` [J, M]. ``skip_pad`` leaves row 0 out of the softmax; then no target
    may be 0. The scores [..., N] are stored in memory.
    """
    products = hidden @ items.mT
    # Large products are subtracted before they are scaled. Otherwise the log-sum-exp would lose digits.
    top = products.detach()[..., PAD + 1 if skip_pad else PAD :].amax(dim=-1, keepdim=True)
    largest = torch.finfo(top.dtype).max
    scores = (products - top.clamp(-largest, largest)) * scale
    own = scores.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return own - (scores[..., PAD + 1 :] if skip_pad else scores).logsumexp(dim=-1)


def target_logprob_and_rank(
    hidden: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    skip_pad: bool = False,
    ties: str = "order",
    ranked: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return :func:`target_logprob`, and the rank of the target among the softmax's items as in :func:`target_rank`.

    The rank is int64 [...]. With ``ranked`` it is [``ranked``], for the first of all rows.
    """
    first = PAD + 1 if skip_pad else PAD
    scores = (hidden.detach() @ items.detach()[..., first:, :].mT).flatten(0, -2)[:ranked]
    scores = scores.nan_to_num(nan=-float("inf"), posinf=float("inf"), neginf=-float("inf"))
    own = target.flatten()[:ranked] - first
    rank = outranking(scores, 0, own, scores.gather(1, own[:, None]).squeeze(1), ties=ties).sum(dim=1)
    logprob = target_logprob(hidden, items, target, scale=scale, skip_pad=skip_pad)
    return logprob, rank.reshape(target.shape) if ranked is None else rank


def linear_cross_entropy(
    hidden: Tensor, items: Tensor, target: Tensor, *, scale: float = 1.0, skip_pad: bool = False, reduction: str = "mean"
) -> Tensor:
    """Return ``-target_logprob``, reduced by ``reduction``: ``none``, ``mean`` or ``sum``. Others raise :class:`InputError`."""
    return reduced(-target_logprob(hidden, items, target, scale=scale, skip_pad=skip_pad), reduction)


def reduced(loss: Tensor, reduction: str) -> Tensor:
    """Return ``loss`` itself, its mean or its sum, as ``reduction`` says."""
    check_reduction(reduction)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def check_reduction(reduction: str) -> None:
    """Raise :class:`InputError` unless ``reduction`` is one of ``REDUCTIONS``."""
    choice("reduction", reduction, REDUCTIONS)
