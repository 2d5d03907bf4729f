"""What needs no training: popularity and first-order Markov, ranked by the same protocol as the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lares_fast.data import InteractionLog, Rows, Split
from lares_fast.reference.target_rank import outranking
from lares_fast.reference.topk import mask_excluded
from lares_fast.train.evaluate import MASKED, NOT_MASKED, history_of

_BATCH = 256


def popularity_ranks(log: InteractionLog, split: Split, rows: Rows) -> dict[str, Tensor]:
    """Ranks by how often an item occurs in the training events; returned as by ``model_ranks``."""
    counts = _item_counts(log, split)
    return _ranks(log, rows, lambda last: counts.expand(len(last), -1))


def markov_ranks(log: InteractionLog, split: Split, rows: Rows) -> dict[str, Tensor]:
    """Ranks by how often an item followed the row's last item in training, ties by popularity."""
    seen = _in_training(log, split)
    follows = seen & np.roll(seen, 1)
    follows[log.offsets[:-1]] = False
    following = np.flatnonzero(follows)
    previous = log.items[following - 1]
    order = np.argsort(previous, kind="stable")
    next_items = torch.from_numpy(log.items[following[order]].astype(np.int64))
    begins = torch.from_numpy(np.searchsorted(previous[order], np.arange(log.n_items + 1)))
    counts = _item_counts(log, split)
    tie_break = counts / (counts.max() + 1)

    def scores(last: Tensor) -> Tensor:
        begin, length = begins[last], begins[last + 1] - begins[last]
        query = torch.repeat_interleave(torch.arange(len(last)), length)
        place = torch.arange(len(query)) - (length.cumsum(0) - length)[query] + begin[query]
        transitions = torch.zeros(len(last), log.n_items, dtype=torch.float64)
        ones = torch.ones(len(query), dtype=torch.float64)
        return transitions.index_put_((query, next_items[place]), ones, accumulate=True) + tie_break

    return _ranks(log, rows, scores)


def _in_training(log: InteractionLog, split: Split) -> np.ndarray:
    """Bool [E]: the events that training may see."""
    return np.arange(log.n_events) < np.repeat(split.train_end, log.lengths)


def _item_counts(log: InteractionLog, split: Split) -> Tensor:
    counts = np.bincount(log.items[_in_training(log, split)], minlength=log.n_items)
    return torch.from_numpy(counts).double()


def _ranks(log: InteractionLog, rows: Rows, scores_after: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Ranks under ``scores_after(last item [B]) -> [B, N]``."""
    ranks = {name: torch.empty(len(rows), dtype=torch.int64) for name in (NOT_MASKED, MASKED)}
    for index in torch.arange(len(rows)).split(_BATCH):
        ends = rows.ends[index.numpy()]
        target = torch.from_numpy(log.items[ends].astype(np.int64))
        scores = scores_after(torch.from_numpy(log.items[ends - 1].astype(np.int64)))
        own = scores.gather(1, target[:, None]).squeeze(1)
        better = outranking(scores[:, 1:], 0, target - 1, own)
        seen = mask_excluded(history_of(log, rows, index), len(index), 0, log.n_items - 1)
        ranks[NOT_MASKED][index] = better.sum(dim=1)
        ranks[MASKED][index] = (better & ~seen).sum(dim=1)
    return ranks
