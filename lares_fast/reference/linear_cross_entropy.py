"""Log-probabilities and cross entropy of targets under a softmax over the whole item table."""

from __future__ import annotations

from torch import Tensor

from lares_fast._errors import InputError

PAD = 0
REDUCTIONS = ("none", "mean", "sum")


def target_logprob(hidden: Tensor, items: Tensor, target: Tensor, *, skip_pad: bool = False) -> Tensor:
    """``log_softmax(hidden @ items.T)[..., target]`` for ``hidden`` [..., D], ``items`` [N, D], ``target`` [...] int64.

    ``skip_pad`` takes row 0 out of the softmax. Holds the scores [..., N].
    """
    scores = hidden @ items.T
    own = scores.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return own - (scores[..., PAD + 1 :] if skip_pad else scores).logsumexp(dim=-1)


def linear_cross_entropy(
    hidden: Tensor, items: Tensor, target: Tensor, *, skip_pad: bool = False, reduction: str = "mean"
) -> Tensor:
    """``-target_logprob`` reduced by ``reduction``: ``none``, ``mean`` or ``sum``."""
    loss = -target_logprob(hidden, items, target, skip_pad=skip_pad)
    if reduction not in REDUCTIONS:
        raise InputError(f"reduction must be one of {', '.join(REDUCTIONS)}, but got {reduction!r}.")
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
