"""The place of the target among all items, without a [B, N] matrix of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from lares_fast.reference.topk import Exclude, item_chunks, mask_excluded


def target_rank(query: Tensor, items: Tensor, target: Tensor, *, exclude: Exclude | None = None, ties: str = "order") -> Tensor:
    """Items that outrank the target: int64 [B], 0 is best.

    ``query`` [B, D], ``items`` [N, D], ``target`` [B] int64. An item j outranks target t if
    ``s_j > s_t``, or with ``ties="order"`` also if ``s_j == s_t and j < t`` (so a model whose scores are
    all equal earns nothing); ``ties="strict"`` is the official reward. ``exclude`` takes items out of the
    ranking, never the target itself. Workspace: B x 16384 scores.

    Both passes take a score from the same product of the same shape, so an item with the target's own
    embedding ties with it exactly, and the target cannot outrank itself by rounding.
    """
    target_score = query.new_empty(len(query))
    for start, chunk in item_chunks(items):
        inside = (target >= start) & (target < start + len(chunk))
        local = torch.where(inside, target - start, 0)
        target_score = torch.where(inside, (query @ chunk.T).gather(1, local[:, None]).squeeze(1), target_score)
    target_score = _nan_last(target_score)

    rank = torch.zeros(len(query), dtype=torch.int64, device=query.device)
    for start, chunk in item_chunks(items):
        rank += count_better(_nan_last(query @ chunk.T), start, target, target_score, exclude=exclude, ties=ties)
    return rank


def count_better(
    scores: Tensor, start: int, target: Tensor, target_score: Tensor, *, exclude: Exclude | None = None, ties: str = "order"
) -> Tensor:
    """How many of the items ``start``, ``start + 1``, ... with ``scores`` [B, n] outrank the target: int64 [B]."""
    better = scores > target_score[:, None]
    if ties == "order":
        ids = torch.arange(start, start + scores.shape[1], device=scores.device)
        better |= (scores == target_score[:, None]) & (ids < target[:, None])
    if exclude is not None:
        better &= ~mask_excluded(exclude, len(scores), start, scores.shape[1])
    return better.sum(dim=1)


def _nan_last(scores: Tensor) -> Tensor:
    return scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
