"""Batches of rows as packed tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lares_fast import _random
from lares_fast._errors import InputError
from lares_fast.data.log import InteractionLog
from lares_fast.data.split import Rows
from lares_fast.sequences import Sequences


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows, all int64 tensors on one device.

    ``items``
        [P] dense items, one row's input behind the other, each oldest first.
    ``offsets``
        [B + 1]: row b's input is ``items[offsets[b]:offsets[b + 1]]``, of 1..``max_len`` items.
    ``target``
        [B] dense item that came next.
    ``rows``
        [B] index of each row in its :class:`Rows`.
    ``users``
        [B] index of the user.
    """

    items: Tensor
    offsets: Tensor
    target: Tensor
    rows: Tensor
    users: Tensor

    def __len__(self) -> int:
        return len(self.target)

    @property
    def sequences(self) -> Sequences:
        """The packed sequences of the rows, for ``model.encode(*batch.sequences)``."""
        return Sequences(self.items, self.offsets)

    def to(self, device: torch.device | str) -> Batch:
        """A copy on ``device``; copies from pinned memory do not wait."""
        return Batch(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory (needs a CUDA device)."""
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


def make_batch(log: InteractionLog, rows: Rows, index: Tensor | NDArray[Any], max_len: int) -> Batch:
    """The rows ``index`` [B] (integers in 0..R-1, a CPU tensor or an array) with inputs cut to their last ``max_len``."""
    chosen = np.asarray(index, dtype=np.int64)
    ends, users = rows.ends[chosen], rows.users[chosen].astype(np.int64)
    starts = np.maximum(log.offsets[users], ends - max_len)
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(ends - starts)))
    flat = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts)
    items = log.items[flat].astype(np.int64)
    target = log.items[ends].astype(np.int64)
    return Batch(*map(torch.from_numpy, (items, offsets, target, chosen.copy(), users)))


def epoch_order(n_rows: int, key: _random.Key) -> Tensor:
    """A permutation of 0..n_rows-1, [n_rows] int64, that depends on ``n_rows`` and ``key`` only.

    Raises :class:`InputError` if there is no row.
    """
    if n_rows < 1:
        raise InputError("n_rows must be at least 1, but there is no row to train on: give a split with training rows.")
    return torch.randperm(n_rows, generator=_random.generator(key))
