"""Batches of prediction tasks as packed tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lares_fast import _random
from lares_fast._errors import InputError
from lares_fast._native_call import allocation
from lares_fast._numbers import shown, whole
from lares_fast.data.log import InteractionLog
from lares_fast.data.split import Rows
from lares_fast.sequences import Sequences


@dataclass(frozen=True, eq=False)
class Inputs:
    """S packed sequences ``items`` [P] and ``offsets`` [S + 1], and ``target`` [B], the next item of the first B of them.

    The fields are int64 tensors, as in :class:`Batch`.
    """

    items: Tensor
    offsets: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    @property
    def sequences(self) -> Sequences:
        """The packed sequences of the rows, for ``model.encode(*batch.sequences)``."""
        return Sequences(self.items, self.offsets)

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on ``device``. Copies from pinned memory do not wait."""
        return type(self)(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))

    def pin_memory(self) -> Self:
        """Return a copy in page-locked memory. This needs a CUDA device."""
        return type(self)(*(getattr(self, field.name).pin_memory() for field in fields(self)))


@dataclass(frozen=True, eq=False)
class Batch(Inputs):
    """B rows of a :class:`Rows`. Every field is an int64 tensor.

    ``items``
        [P] dense item ids: the inputs of all rows, one behind the other, each oldest first.
    ``offsets``
        [B + 1]. The input of row b is ``items[offsets[b]:offsets[b + 1]]`` and has 1 to ``max_len`` items.
    ``target``
        [B] dense id of the item that came next.
    ``rows``
        [B] index of the row in its :class:`Rows`.
    ``users``
        [B] index of the user.
    """

    rows: Tensor
    users: Tensor


@dataclass(frozen=True, eq=False)
class Places:
    """The places of S packed sequences in a log. A device that has the log makes :class:`Inputs` of them.

    ``starts``
        [S] int64: the position in ``log.items`` of the first item of each sequence.
    ``offsets``
        [S + 1] int64, as in :class:`Inputs`.
    ``n_tokens, n_targets``
        P, the number of items of all sequences, and B, the number of sequences whose next item is wanted.
    """

    starts: Tensor
    offsets: Tensor
    n_tokens: int
    n_targets: int

    def inputs(self, log: InteractionLog) -> Inputs:
        """Return the items of ``log`` at these places, on the CPU."""
        starts, lengths = self.starts.numpy(), self.offsets.diff().numpy()
        items, _ = log.events(starts, starts + lengths)
        target = log.items[(starts + lengths)[: self.n_targets]].astype(np.int64)
        return Inputs(torch.from_numpy(items), self.offsets, torch.from_numpy(target))


def make_batch(log: InteractionLog, rows: Rows, index: Tensor | NDArray[Any], max_len: int) -> Batch:
    """Return the rows ``index`` [B] as a batch, each input cut to its last ``max_len`` items.

    ``index`` holds integers in 0..R-1, as a CPU tensor, an array or a list. Raises :class:`InputError` for any other
    ``index``, and for a ``max_len`` below 1.
    """
    if (max_len := whole("max_len", max_len)) < 1:
        raise InputError(f"max_len must be at least 1, but got {max_len}.")
    chosen = _checked_index(index, len(rows))
    ends, users = rows.ends[chosen], rows.users[chosen].astype(np.int64)
    # A larger max_len cuts nothing.
    items, offsets = log.events(np.maximum(log.offsets[users], ends - min(max_len, log.n_events)), ends)
    target = log.items[ends].astype(np.int64)
    return Batch(*map(torch.from_numpy, (items, offsets, target, chosen.copy(), users)))


def _checked_index(index: Any, count: int) -> NDArray[np.int64]:
    """Return ``index`` as an array [B]. Raises :class:`InputError` unless it holds integers in 0..``count`` - 1."""
    try:
        found = np.asarray(index.resolve_neg() if isinstance(index, Tensor) else index)
    except (RuntimeError, TypeError, ValueError):
        raise InputError(f"index must be a tensor on the CPU or an array, but got {shown(index)}.") from None
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise InputError(f"index must hold integers [B], but got {shown(index)}.")
    if found.size and not 0 <= found.min() <= found.max() < count:
        raise InputError(f"index must be in 0..{count - 1}, the rows, but spans {found.min()}..{found.max()}.")
    return found.astype(np.int64)


def input_lengths(log: InteractionLog, rows: Rows, max_len: int) -> NDArray[np.int64]:
    """Return the number of items of the input of each row, [R] int64."""
    return np.minimum(rows.ends - log.offsets[rows.users], max_len)


def epoch_order(n_rows: int, key: _random.Key) -> Tensor:
    """Return a permutation of 0..n_rows-1, [n_rows] int64, that depends only on ``n_rows`` and ``key``.

    Raises :class:`InputError` if there is no row.
    """
    if (n_rows := whole("n_rows", n_rows)) < 1:
        raise InputError("n_rows must be at least 1, but there is no row to train on: give a split with training rows.")
    if n_rows >= 2**63:
        raise InputError(f"n_rows must be less than 2^63, but got {n_rows}.")
    with allocation(f"a permutation of n_rows {n_rows}"):
        return torch.randperm(n_rows, generator=_random.generator(_random.checked_key("key", key)))
