"""An interaction log in memory: the items of every user in order, as compressed rows (CSR)."""

from __future__ import annotations

import hashlib
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError
from lares_fast._numbers import is_masked
from lares_fast.data.filters import Filters

Ids = NDArray[Any]

# int() would also read "1_0". No id has more digits.
_INTEGER = re.compile(r" *[+-]?[0-9]{1,100} *")


@dataclass(frozen=True, eq=False, kw_only=True)
class InteractionLog:
    """The items of every user, oldest first.

    ``items``
        [E] int32 dense item ids in 1..n_items-1. 0 stands for PAD and never occurs.
    ``offsets``
        [U+1] int64. The events of user u are ``items[offsets[u]:offsets[u + 1]]``.
    ``times``
        [E] int64 or float64 in the unit of the file. They never decrease within a user. ``None`` if the source has no times.
    ``user_ids, item_ids``
        [U] and [n_items] raw ids, int64 or objects of type str. ``item_ids[0]`` is a placeholder for PAD.
    ``name``
        The origin of the log, as tables show it.
    ``dropped``
        Counts of the events and users that reading left out, by reason.
    ``synthetic``
        Whether a generator made the events. They then describe no real person.
    ``source``
        The settings in ``data`` of a run that read or draw this log again, such as ``{"path": "/logs/shop.csv"}``. ``None``
        if the log was made in memory.
    """

    items: NDArray[np.int32]
    offsets: NDArray[np.int64]
    user_ids: Ids
    item_ids: Ids
    times: NDArray[Any] | None = None
    name: str = "memory"
    dropped: dict[str, int] = field(default_factory=dict)
    synthetic: bool = False
    source: dict[str, Any] | None = None

    @property
    def n_users(self) -> int:
        """The number of users, U."""
        return len(self.offsets) - 1

    @property
    def n_items(self) -> int:
        """The number of rows of the item table, N, with the PAD row 0."""
        return len(self.item_ids)

    @property
    def n_events(self) -> int:
        """The number of events, E."""
        return len(self.items)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """The number of events of each user, [U] int64."""
        return np.diff(self.offsets)

    def history(self, user: int) -> NDArray[np.int32]:
        """Return a view of the dense items of the user with index ``user`` in 0..U-1: [length] int32, oldest first.

        Raises :class:`InputError` for another index.
        """
        if not 0 <= user < self.n_users:
            raise InputError(f"user must be an index in 0..{self.n_users - 1}, but got {user}.")
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def events(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the dense items of the slices ``starts[b]:ends[b]`` of all events, packed one behind the other.

        ``starts`` and ``ends`` are [B]. Returns ``(items [P] int64, offsets [B + 1] int64)``: the items of slice b are
        ``items[offsets[b]:offsets[b + 1]]``.
        """
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(ends - starts)))
        flat = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], ends - starts)
        return self.items[flat].astype(np.int64), offsets

    def lookup_items(self, raw: Iterable[Any]) -> NDArray[np.int64]:
        """Return the dense ids [n] int64 of raw item ids. The dense id is 0 (PAD) where the raw id is unknown.

        Text such as ``"42"`` finds integer ids. Raises :class:`InputError` for a value that cannot be an id of this log.
        """
        return self._item_index.find(raw) + 1

    def lookup_users(self, raw: Iterable[Any]) -> NDArray[np.int64]:
        """Return the indices [n] int64 of raw user ids, -1 where the id is unknown.

        Text and errors are handled as in :meth:`lookup_items`.
        """
        return self._user_index.find(raw)

    @cached_property
    def _item_index(self) -> _Index:
        return _Index(self.item_ids[1:], f"item ids of {self.name}")

    @cached_property
    def _user_index(self) -> _Index:
        return _Index(self.user_ids, f"user ids of {self.name}")

    def fingerprint(self) -> str:
        """Return the sha256 (64 hex digits) of the dense items and the offsets. Equal data give equal values on any machine."""
        digest = hashlib.sha256(self.offsets.astype("<i8").tobytes())
        digest.update(self.items.astype("<i4").tobytes())
        return digest.hexdigest()

    def statistics(self) -> dict[str, Any]:
        """Return plain values: users, items (PAD not counted), interactions, lengths, density and ``dropped``."""
        lengths = self.lengths
        return {
            "name": self.name,
            "synthetic": self.synthetic,
            "users": self.n_users,
            "items": self.n_items - 1,
            "interactions": self.n_events,
            "mean_length": float(lengths.mean()),
            "median_length": float(np.median(lengths)),
            "min_length": int(lengths.min()),
            "max_length": int(lengths.max()),
            "density": self.n_events / (self.n_users * (self.n_items - 1)),
            "dropped": dict(self.dropped),
        }

    def summary(self) -> str:
        """Return the statistics as text to print, in one to three lines."""
        s = self.statistics()
        lines = [
            f"{s['name']}: {s['users']:,} users, {s['items']:,} items, {s['interactions']:,} interactions; "
            f"length mean {s['mean_length']:.2f}, median {s['median_length']:g}, {s['min_length']:,} to {s['max_length']:,}; "
            f"density {100 * s['density']:.4f} %"
        ]
        if self.synthetic:
            lines.append("This log is synthetic: a seeded generator made it, and it describes no real people or products.")
        if any(self.dropped.values()):
            lines.append("left out: " + ", ".join(f"{reason} ({count:,})" for reason, count in self.dropped.items()))
        return "\n".join(lines)


class _Index:
    """Finds the positions of raw ids, by binary search (integers) or in a dictionary (strings)."""

    def __init__(self, ids: Ids, what: str) -> None:
        self._what = what
        self._table: dict[str, int] | None = None
        if ids.dtype == object:
            self._table = {raw: position for position, raw in enumerate(ids.tolist())}
        else:
            self._order = np.argsort(ids, kind="stable")
            self._sorted = ids[self._order]

    def find(self, raw: Iterable[Any]) -> NDArray[np.int64]:
        if is_masked(raw):
            raise InputError(f"{self._what} are integers or strings; look up an array without masked entries.")
        wanted = raw.ravel() if isinstance(raw, np.ndarray) else list(raw)
        if self._table is not None:
            return np.array([self._table.get(str(_plain(value, self._what)), -1) for value in wanted], dtype=np.int64)
        if isinstance(raw, np.ndarray) and raw.dtype.kind == "i":
            values, fits = raw.astype(np.int64).ravel(), np.ones(raw.size, dtype=bool)
        else:
            numbers = [_number(value, self._what) for value in wanted]
            # A number that does not fit 64 bits is not an id of this log.
            fits = np.array([-(2**63) <= number < 2**63 for number in numbers], dtype=bool)
            values = np.array(numbers, dtype=object)
            values[~fits] = 0
            values = values.astype(np.int64)
        at = np.minimum(np.searchsorted(self._sorted, values), len(self._sorted) - 1)
        return np.where(fits & (self._sorted[at] == values), self._order[at], -1)


def _plain(value: Any, what: str) -> str | int:
    """Return ``value`` as a string or an integer. Raises :class:`InputError` for all else, and for a truth value."""
    if isinstance(value, str):
        return value
    try:
        if isinstance(value, bool | np.bool_) or is_masked(value):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise InputError(f"{what} are integers or strings; look up such ids instead of {str(value)[:40]!r}.") from None


def _number(value: Any, what: str) -> int:
    plain = _plain(value, what)
    if isinstance(plain, str) and not _INTEGER.fullmatch(plain):
        raise InputError(f"{what} are integers; look up integers instead of {plain[:40]!r}.")
    return int(plain)


def assemble(
    users: NDArray[Any],
    user_ids: Ids,
    items: NDArray[Any],
    item_ids: Ids,
    times: NDArray[Any] | None,
    rated: NDArray[np.bool_] | None,
    *,
    name: str,
    filters: Filters,
) -> InteractionLog:
    """Apply ``filters``, group events by user, and sort the events of each user by time.

    ``users`` and ``items`` [E] hold codes into ``user_ids`` [U'] and ``item_ids`` [M']. ``rated`` [E] tells whether a rating is
    high enough. Events of equal time keep their order. Ids that no remaining event uses are left out of the log, and the other
    ids keep their order. Raises :class:`InputError` if no user is left.
    """
    order, counts, dropped = filters.order(users, len(user_ids), items, times, rated, name)
    items = items[order]
    used = np.bincount(items, minlength=len(item_ids)) > 0
    # The first id that is used becomes 1.
    dense = np.cumsum(used, dtype=np.int32)
    known = item_ids[used]
    pad = np.array(["" if known.dtype == object else 0], dtype=known.dtype)
    return InteractionLog(
        items=dense[items],
        offsets=np.concatenate(([0], np.cumsum(counts[counts > 0]))).astype(np.int64),
        times=None if times is None else times[order],
        user_ids=user_ids[counts > 0],
        item_ids=np.concatenate((pad, known)),
        name=name,
        dropped=dropped,
    )
