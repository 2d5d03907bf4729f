"""Which events of a file become the log: by rating, without duplicates, and by the number of events of users and items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lares_fast._errors import InputError
from lares_fast._numbers import choice, number, whole
from lares_fast.config import DUPLICATES
from lares_fast.data._order import stable_order

_REPEATED = {
    "same-time": "repeated events of one user, item and time",
    "first": "later events of a user with the same item",
    "last": "earlier events of a user with the same item",
}


@dataclass(frozen=True, kw_only=True)
class Filters:
    """The filters of a log, in the order in which they are applied.

    ``min_rating``
        First, events with a lower rating are left out. With ``None`` no ratings are read.
    ``duplicates``
        Then duplicates are left out. ``keep`` leaves out none. ``same-time`` keeps one event of those that have the same
        user, item and time. ``first`` and ``last`` keep only the first or the last event of a user with an item.
    ``min_events, min_item_events``
        At last, users with fewer than ``min_events`` events and items with fewer than ``min_item_events`` are left out, in
        turns until none is left. With the same number k for both, the rest is the k-core.

    Raises :class:`InputError` for another value.
    """

    min_rating: float | None = None
    duplicates: str = "keep"
    min_events: int = 3
    min_item_events: int = 1

    def __post_init__(self) -> None:
        choice("duplicates", self.duplicates, DUPLICATES)
        if self.min_rating is not None:
            object.__setattr__(self, "min_rating", number("min_rating", self.min_rating))
        for name in ("min_events", "min_item_events"):
            value = whole(name, getattr(self, name))
            if value < 1:
                raise InputError(f"{name} must be at least 1, but got {value}.", f"data.{name}")
            object.__setattr__(self, name, value)

    def order(
        self,
        users: NDArray[Any],
        n_users: int,
        items: NDArray[Any],
        times: NDArray[Any] | None,
        rated: NDArray[np.bool_] | None,
        name: str,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[str, int]]:
        """Sort the events that stay by user and then by time, and count the others.

        ``users``, ``items`` [E] are codes, ``times`` [E] or ``None``, and ``rated`` [E] tells whether a rating is high enough.
        Returns the positions of the events that stay [P], the number of events of each user [n_users], which is 0 for users
        that are left out, and the counts of what was left out by reason. Raises :class:`InputError` if no user is left.
        """
        order = stable_order(users) if times is None else stable_order(times, users)
        dropped: dict[str, int] = {}
        if rated is not None and (low := len(rated) - np.count_nonzero(rated)):
            order = order[rated[order]]
            dropped[f"events with a rating under {self.min_rating:g}"] = int(low)
        if self.duplicates != "keep":
            single = _single(users[order], items[order], self._compared(times, order, name), last=self.duplicates == "last")
            if repeated := len(order) - len(single):
                order = order[single]
                dropped[_REPEATED[self.duplicates]] = repeated
        order, counts, few = self._core(users, n_users, items, order)
        dropped |= few
        if not len(order):
            raise self._nothing_left(name, dropped)
        return order, counts, dropped

    def _compared(self, times: NDArray[Any] | None, order: NDArray[np.int64], name: str) -> NDArray[Any] | None:
        """Return the times that duplicates have in common, or ``None`` if their times may differ."""
        if self.duplicates != "same-time":
            return None
        if times is None:
            raise InputError(
                f"{name} is read without times, which duplicates=same-time compares: choose first, last or keep.",
                "data.duplicates",
            )
        return times[order]

    def _core(
        self, users: NDArray[Any], n_users: int, items: NDArray[Any], order: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[str, int]]:
        """Leave out users and items with few events in turns. Returns as :meth:`order`."""
        events, n_items = {"user": 0, "item": 0}, 0
        while True:
            counts = np.bincount(users if len(order) == len(users) else users[order], minlength=n_users)
            enough = counts >= self.min_events
            kept = order if enough.all() else order[enough[users[order]]]
            events["user"] += len(order) - len(kept)
            order = kept
            if self.min_item_events == 1:
                break
            of_items = np.bincount(items[order])
            few = (of_items > 0) & (of_items < self.min_item_events)
            if not few.any():
                break
            n_items += int(np.count_nonzero(few))
            kept = order[~few[items[order]]]
            events["item"] += len(order) - len(kept)
            order = kept
        dropped = {}
        for what, least, number_of in (
            ("user", self.min_events, int(np.count_nonzero(~enough))),
            ("item", self.min_item_events, n_items),
        ):
            if number_of:
                dropped[f"{what}s with fewer than {least} events"] = number_of
                dropped[f"events of those {what}s"] = events[what]
        return order, np.where(enough, counts, 0), dropped

    def _nothing_left(self, name: str, dropped: dict[str, int]) -> InputError:
        if self == Filters(min_events=self.min_events):
            text = f"{name}: no user has {self.min_events} events or more; check the file, its format and min_events."
            return InputError(text, "data.min_events")
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in dropped.items())
        return InputError(f"{name}: the filters leave out every event: {reasons}; choose lower thresholds.")


def _single(users: NDArray[Any], items: NDArray[Any], times: NDArray[Any] | None, *, last: bool) -> NDArray[np.int64]:
    """Return the positions [P], ascending, without those of duplicates: of equal users, items and ``times``, if given.

    The first of duplicates stays, or the ``last``.
    """
    keys = [items, users] if times is None else [items, times, users]
    order = stable_order(*keys)
    changes = np.zeros(max(len(order) - 1, 0), bool)
    for key in keys:
        key = key[order]
        changes |= key[1:] != key[:-1]
    edge = np.ones(min(len(order), 1), bool)
    return np.sort(order[np.concatenate((changes, edge) if last else (edge, changes))])
