"""Splits of a log into training, validation and test rows. A row is a pair (user, position) into the log."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError
from lares_fast.data.log import InteractionLog


@dataclass(frozen=True, eq=False)
class Rows:
    """Prediction tasks. Row r predicts ``log.items[ends[r]]`` from the earlier events of that user.

    ``users``
        [R] int32: the index of the user.
    ``ends``
        [R] int64: the position of the target in ``log.items``. The input is ``log.items[max(start, end - L):end]`` with
        ``start = log.offsets[user]``. It is never empty.
    """

    users: NDArray[np.int32]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def targets(self, log: InteractionLog) -> NDArray[np.int32]:
        """Return the dense target items [R] int32."""
        return log.items[self.ends]


@dataclass(frozen=True, eq=False)
class Split:
    """The rows of the three parts.

    ``train_end``
        [U] int64. Training may see the events ``log.items[log.offsets[u]:train_end[u]]`` of user u, and no others.
    ``protocol``
        The name of the split in tables of results.
    """

    train: Rows
    valid: Rows
    test: Rows
    train_end: NDArray[np.int64]
    protocol: str

    def summary(self) -> str:
        """Return one line with the protocol and the number of rows of each part."""
        return f"{self.protocol}: {len(self.train):,} training, {len(self.valid):,} validation, {len(self.test):,} test rows"


def leave_one_out(log: InteractionLog) -> Split:
    """Split the items s of each user: test on the last item, validate on the item before it, train on ``s[:-2]``.

    Training rows are all non-empty prefixes of ``s[:-2]`` with the next item as target. Their number is the number of events
    minus 3 for each user. Raises :class:`InputError` if a user has fewer than 3 events, or if no user has more than 3.
    """
    if short := int((log.lengths < 3).sum()):
        raise InputError(f"{log.name}: leave-one-out needs 3 events a user, but {short:,} have fewer; read with min_events=3.")
    if not (log.lengths > 3).any():
        raise InputError(
            f"{log.name}: leave-one-out leaves no row to train on, since no user has more than 3 events; "
            "give a log with longer histories."
        )
    users = np.arange(log.n_users, dtype=np.int32)
    stop = log.offsets[1:]
    return Split(
        train=_prefixes(log, stop - 2),
        valid=Rows(users, stop - 2),
        test=Rows(users, stop - 1),
        train_end=stop - 2,
        protocol="leave-one-out",
    )


def cutoffs(log: InteractionLog, valid_fraction: float = 0.1, test_fraction: float = 0.1) -> tuple[float, float]:
    """Return times (valid_from, test_from) that put about these fractions of all events into the two last windows.

    Raises :class:`InputError` if the log has no times or the fractions leave nothing to train on.
    """
    if not (valid_fraction > 0 and test_fraction > 0 and valid_fraction + test_fraction < 1):
        raise InputError(
            f"valid_fraction and test_fraction must be positive and sum below 1, but are {valid_fraction} and {test_fraction}."
        )
    n = log.n_events
    at = [min(int(n * share), n - 1) for share in (1 - valid_fraction - test_fraction, 1 - test_fraction)]
    valid_from, test_from = np.partition(_times(log), at)[at]
    return valid_from.item(), test_from.item()


def temporal_split(log: InteractionLog, valid_from: float, test_from: float) -> Split:
    """Cut the log at two moments, which are equal for all users.

    - Training has the events strictly before ``valid_from`` only, as input and as target.
    - Validation has at most one row for each user: the first event in [valid_from, test_from) with an earlier event of the
      user. All earlier events are its input.
    - Testing has at most one row for each user: the first event from ``test_from`` on with an earlier event of the user.

    Items that first occur after ``valid_from`` stay in the catalog. They are ranked like all others, although no training row
    has them. Raises :class:`InputError` if the log has no times, if the moments are out of order, or if a part is empty.
    """
    times = _times(log)
    if not valid_from < test_from:
        raise InputError(f"valid_from must be before test_from, but got {valid_from} and {test_from}.")
    starts, stops = log.offsets[:-1], log.offsets[1:]
    valid_start, test_start = (starts + _count_before(log, times, moment) for moment in (valid_from, test_from))
    split = Split(
        train=_prefixes(log, valid_start),
        valid=_first_with_history(log, valid_start, test_start),
        test=_first_with_history(log, test_start, stops),
        train_end=valid_start,
        protocol=f"temporal split at {valid_from} and {test_from}, first event of each user in each window",
    )
    for part in ("train", "valid", "test"):
        if not len(getattr(split, part)):
            raise InputError(
                f"{log.name}: no {part} rows with valid_from {valid_from} and test_from {test_from}; "
                f"the log's times go from {times.min()} to {times.max()}."
            )
    return split


def _times(log: InteractionLog) -> NDArray[np.int64 | np.float64]:
    if log.times is None:
        raise InputError(f"{log.name}: a temporal split needs the time of each event, and this log has none.")
    return log.times


def _count_before(log: InteractionLog, times: NDArray[np.int64 | np.float64], moment: float) -> NDArray[np.int64]:
    """Return the number of events of each user strictly before ``moment``, [U] int64. Times never decrease within a user."""
    if times.dtype == np.int64 and math.isfinite(moment):
        # A comparison with a float would round the integers to floats.
        moment = math.ceil(moment)
    running = np.concatenate(([0], np.cumsum(times < moment)))
    return running[log.offsets[1:]] - running[log.offsets[:-1]]


def _prefixes(log: InteractionLog, train_end: NDArray[np.int64]) -> Rows:
    """Return all rows whose target is before ``train_end`` [U] and is not the first event of its user."""
    starts = log.offsets[:-1]
    counts = np.maximum(train_end - starts - 1, 0)
    users = np.repeat(np.arange(log.n_users, dtype=np.int32), counts)
    before = np.cumsum(counts) - counts
    return Rows(users, np.arange(len(users)) + (starts + 1 - before)[users])


def _first_with_history(log: InteractionLog, begin: NDArray[np.int64], end: NDArray[np.int64]) -> Rows:
    """Return for each user the first event in [begin, end) that is not the first of all events of the user."""
    first = np.maximum(begin, log.offsets[:-1] + 1)
    users = np.flatnonzero(first < end).astype(np.int32)
    return Rows(users, first[users])
