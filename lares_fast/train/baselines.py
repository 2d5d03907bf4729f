"""Baselines without training: popularity and a first-order Markov chain. They rank by the protocol of the model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lares_fast.data import InteractionLog, Rows, Split
from lares_fast.train.evaluate import MASKED, NOT_MASKED, Progress, history_of

_BATCH_ROWS, _BATCH_EVENTS = 4096, 1 << 18
_NOTHING = np.empty(0, np.int64)


def popularity_ranks(log: InteractionLog, split: Split, rows: Rows, progress: Progress | None = None) -> dict[str, Tensor]:
    """Rank items by how often they occur in the training events, ties by id.

    Return the rank of each row's target, [R] int64, under the names ``not masked`` and ``masked``: see ``model_ranks``.
    ``progress`` is called after each batch with the number of finished rows and of all rows.
    """
    return _ranks(log, rows, _Followers(_places(log, split), _NOTHING, _NOTHING), progress)


def markov_ranks(log: InteractionLog, split: Split, rows: Rows, progress: Progress | None = None) -> dict[str, Tensor]:
    """Rank items by how often they followed the row's last item in training, ties by popularity, then by id.

    The result and ``progress`` are as in :func:`popularity_ranks`.
    """
    seen = _in_training(log, split)
    follows = seen & np.roll(seen, 1)
    follows[log.offsets[:-1]] = False
    following = np.flatnonzero(follows)
    return _ranks(log, rows, _Followers(_places(log, split), log.items[following - 1], log.items[following]), progress)


class _Followers:
    """The order of all items after each item: its followers by how often they followed, then the rest by popularity.

    It stores only pairs of items that occur, sorted by ``previous * N + place of the next item``.
    """

    def __init__(self, place: NDArray[np.int64], previous: NDArray[np.integer], following: NDArray[np.integer]) -> None:
        """``place`` [N] is each item's place by popularity, 0 first; ``previous`` and ``following`` [n] are pairs of items."""
        self.place = place
        self._pairs, self._times = np.unique(previous.astype(np.int64) * len(place) + place[following], return_counts=True)
        of_pair = self._pairs // len(place)
        order = np.lexsort((-self._times, of_pair))
        # For each pair: the number of better followers of its first item.
        self._before = np.empty(len(order), np.int64)
        self._before[order] = np.arange(len(order)) - np.searchsorted(of_pair, of_pair[order])

    def find(self, last: NDArray[np.int64], item: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return how often ``item`` [n] followed ``last`` [n], and the pair's position among the stored pairs.

        A pair that is not stored gets the position where it would be inserted.
        """
        code = last * len(self.place) + self.place[item]
        at = np.searchsorted(self._pairs, code)
        times = np.zeros(len(code), np.int64)
        known = np.flatnonzero(at < len(self._pairs))
        known = known[self._pairs[at[known]] == code[known]]
        times[known] = self._times[at[known]]
        return times, at

    def rank(self, last: NDArray[np.int64], item: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the rank of ``item`` [n] after ``last`` [n], 0 for the best."""
        times, at = self.find(last, item)
        # Items that are more popular rank before it, and less popular items that follow ``last``.
        ranks = self.place[item] + np.searchsorted(self._pairs, (last + 1) * len(self.place)) - at
        follows = times > 0
        ranks[follows] = self._before[at[follows]]
        return ranks


def _ranks(log: InteractionLog, rows: Rows, followers: _Followers, progress: Progress | None) -> dict[str, Tensor]:
    ranks = {name: np.empty(len(rows), dtype=np.int64) for name in (NOT_MASKED, MASKED)}
    for index in _batches(log, rows):
        ends = rows.ends[index]
        last, target = log.items[ends - 1].astype(np.int64), log.items[ends]
        ranks[NOT_MASKED][index] = rank = followers.rank(last, target)
        offsets, history = history_of(log, rows, torch.from_numpy(index))
        row = np.repeat(np.arange(len(index)), offsets.diff().numpy())
        row, item = np.divmod(np.unique(row * log.n_items + history.numpy()), log.n_items)
        own_times, own_place = followers.find(last, target)[0][row], followers.place[target][row]
        times, place = followers.find(last[row], item)[0], followers.place[item]
        outranks = (times > own_times) | ((times == own_times) & (place < own_place))
        ranks[MASKED][index] = rank - np.bincount(row[outranks], minlength=len(index))
        if progress is not None:
            progress(int(index[-1]) + 1, len(rows))
    return {name: torch.from_numpy(rank) for name, rank in ranks.items()}


def _batches(log: InteractionLog, rows: Rows) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of the rows in order, in batches of bounded size whose histories are bounded in total.

    A batch has at least one row.
    """
    events = np.cumsum(rows.ends - log.offsets[rows.users])
    begin = 0
    while begin < len(rows):
        before = events[begin - 1] if begin else 0
        end = int(np.searchsorted(events, before + _BATCH_EVENTS, "right"))
        end = min(max(end, begin + 1), begin + _BATCH_ROWS)
        yield np.arange(begin, end)
        begin = end


def _in_training(log: InteractionLog, split: Split) -> NDArray[np.bool_]:
    """Return a mask [E] of the training events."""
    return np.arange(log.n_events) < np.repeat(split.train_end, log.lengths)


def _places(log: InteractionLog, split: Split) -> NDArray[np.int64]:
    """Return the place [N] of each item by its number of training events, ties by id; PAD comes last."""
    counts = np.bincount(log.items[_in_training(log, split)], minlength=log.n_items)
    place = np.empty(log.n_items, np.int64)
    place[1 + np.argsort(-counts[1:], kind="stable")] = np.arange(log.n_items - 1)
    place[0] = log.n_items - 1
    return place
