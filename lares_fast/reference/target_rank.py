"""The rank of the target among all items, without a [B, N] matrix of scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast.reference.topk import Exclude, item_chunks, mask_excluded

_ALIGNED = 64


def target_rank(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    exclude: Exclude | None = None,
    ties: str = "order",
) -> Tensor:
    """Return the number of items that outrank the target, int64 [B]. The best rank is 0.

    ``query`` is [B, D], ``items`` [N, D], ``target`` [B] int64 and ``bias`` [N]. Item j outranks target t if ``s_j > s_t``.
    With ``ties="order"`` it also outranks t if ``s_j == s_t and j < t``, so a model whose scores are all equal does not get
    good ranks. ``ties="strict"`` is the official reward. ``exclude`` takes items out of the ranking, but never the target
    itself. A NaN score counts as -inf. The workspace is B x 32768 scores.
    """
    return target_ranks(query, items, target, [exclude], bias=bias, ties=ties)[0]


def target_ranks(
    query: Tensor,
    items: Tensor,
    target: Tensor,
    excludes: Sequence[Exclude | None],
    *,
    bias: Tensor | None = None,
    ties: str = "order",
) -> list[Tensor]:
    """Return :func:`target_rank` for each entry of ``excludes``, from the same scores.

    The scores of the target and of the other items come from products of the same shape. So an item with the embedding of the
    target has exactly the target's score, and the target cannot outrank itself by rounding.
    """
    target_score = query.new_zeros(len(query))
    for start, scores in _score_chunks(query, items, bias):
        inside = (target >= start) & (target < start + scores.shape[1])
        local = torch.where(inside, target - start, 0)
        target_score = torch.where(inside, scores.gather(1, local[:, None]).squeeze(1), target_score)

    ranks = [torch.zeros(len(query), dtype=torch.int64, device=query.device) for _ in excludes]
    for start, scores in _score_chunks(query, items, bias):
        better = outranking(scores, start, target, target_score, ties=ties)
        for rank, exclude in zip(ranks, excludes, strict=True):
            kept = better if exclude is None else better & ~mask_excluded(exclude, len(query), start, scores.shape[1])
            rank += kept.sum(dim=1)
    return ranks


def outranking(scores: Tensor, start: int, target: Tensor, target_score: Tensor, *, ties: str = "order") -> Tensor:
    """Return whether each of the items ``start``, ``start + 1``, ..., with ``scores`` [B, n], outranks the target: bool [B, n].

    ``target`` holds ids [B], and ``target_score`` [B] their scores.
    """
    better = scores > target_score[:, None]
    if ties == "order":
        ids = torch.arange(start, start + scores.shape[1], device=scores.device)
        better |= (scores == target_score[:, None]) & (ids < target[:, None])
    return better


def _score_chunks(query: Tensor, items: Tensor, bias: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    width = 0
    for start, chunk in item_chunks(items):
        # All chunks have one shape, a multiple of 64 items: a matrix product of another shape may sum in another order.
        width = width or -(-len(chunk) // _ALIGNED) * _ALIGNED
        whole = chunk if len(chunk) == width else F.pad(chunk, (0, 0, 0, width - len(chunk)))
        scores = (query @ whole.T)[:, : len(chunk)]
        if bias is not None:
            scores = scores + bias[start : start + len(chunk)]
        yield start, scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
