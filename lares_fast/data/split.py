"""Which events are trained on, validated on and tested on; rows are (user, position) pairs into the log."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError
from lares_fast.data.log import InteractionLog


@dataclass(frozen=True, eq=False)
class Rows:
    """Prediction tasks. Row r predicts ``log.items[ends[r]]`` from the same user's events before it.

    ``users``
        [R] int32, index of the user.
    ``ends``
        [R] int64, position of the target in ``log.items``; the input is ``log.items[max(start, end - L):end]``
        with ``start = log.offsets[user]``, and never empty.
    """

    users: NDArray[np.int32]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ends)

    def targets(self, log: InteractionLog) -> NDArray[np.int32]:
        """Dense target items [R] int32."""
        return log.items[self.ends]


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of the three parts.

    ``train_end``
        [U] int64: the events of user u that training may see are ``log.items[log.offsets[u]:train_end[u]]``.
    ``protocol``
        The split in words, for results tables.
    """

    train: Rows
    valid: Rows
    test: Rows
    train_end: NDArray[np.int64]
    protocol: str

    def summary(self) -> str:
        """One line: the protocol and the number of rows of each part."""
        return f"{self.protocol}: {len(self.train):,} training, {len(self.valid):,} validation, {len(self.test):,} test rows"


def leave_one_out(log: InteractionLog) -> Split:
    """Each user's last item is tested, the one before validated, the rest ``s[:-2]`` trained on.

    Training rows are all non-empty prefixes of ``s[:-2]`` with the next item as target: as many as the log has
    events, minus 3 a user. Raises :class:`InputError` if a user has fewer than 3 events, or no user has more.
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
    """Times (valid_from, test_from) that put about these fractions of all events into the two last windows.

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
    """Cut the log at two moments that are the same for everybody.

    Training sees events strictly before ``valid_from`` only, as input and as target. Validation has one row a
    user: their first event in [valid_from, test_from) that has an earlier event of theirs, predicted from all of
    those; testing likewise from ``test_from`` on. Users without such an event have no row there. Items that first
    occur after ``valid_from`` stay in the catalog and are ranked like all others, though no training row has them.
    Raises :class:`InputError` if the log has no times, the moments are out of order or a part is left empty.
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
    """Events [U] int64 of each user strictly before ``moment``; times never fall within a user."""
    if times.dtype == np.int64 and math.isfinite(moment):
        # Beside a float, integers would be rounded to floats.
        moment = math.ceil(moment)
    running = np.concatenate(([0], np.cumsum(times < moment)))
    return running[log.offsets[1:]] - running[log.offsets[:-1]]


def _prefixes(log: InteractionLog, train_end: NDArray[np.int64]) -> Rows:
    """All rows whose target is before ``train_end`` [U] and is not the user's first event."""
    starts = log.offsets[:-1]
    counts = np.maximum(train_end - starts - 1, 0)
    users = np.repeat(np.arange(log.n_users, dtype=np.int32), counts)
    before = np.cumsum(counts) - counts
    return Rows(users, np.arange(len(users)) + (starts + 1 - before)[users])


def _first_with_history(log: InteractionLog, begin: NDArray[np.int64], end: NDArray[np.int64]) -> Rows:
    """For each user the first event in [begin, end) that is not the user's first of all."""
    first = np.maximum(begin, log.offsets[:-1] + 1)
    users = np.flatnonzero(first < end).astype(np.int32)
    return Rows(users, first[users])
