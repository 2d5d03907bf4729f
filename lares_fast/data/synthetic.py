"""The log of an invented shop. The distribution of the next purchase is known, so the best possible score is known, too.

Items are products of ``n_brands`` brands. Each brand makes ``n_types`` types of product. Every user has one favourite brand,
which the log does not show. All users need the types in one common order: after type j comes ``successor[j]``.

With probability ``loyalty`` the next item is a product of the favourite brand, of the type that follows the type of the last
item. Otherwise it is a stray purchase: a product drawn from a Zipf distribution over all products. The first item is always a
stray purchase.

After a stray purchase the last item still determines the next type. It does not show the favourite brand; only the earlier
history does. So a ranking by popularity is poor, a ranking by the last item alone is better, and a model that reads the
history can be better still.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lares_fast import _random
from lares_fast._errors import InputError
from lares_fast.data.log import InteractionLog
from lares_fast.data.split import Rows

MIN_LENGTH = 5
ZIPF_EXPONENT = 1.0
# The time is in seconds since 1970, as in common logs.
FIRST_DAY = 1_600_000_000
BATCH_NUMBERS = 1 << 20
SECONDS_A_YEAR, MEAN_GAP_SECONDS = 365 * 86400, 7 * 86400


@dataclass(frozen=True, eq=False)
class Shop:
    """The probabilities that a synthetic log follows. Item ``1 + brand * n_types + type`` is a brand's product of one type.

    ``successor``
        [n_types] int64: the type that is needed after each type.
    ``stray``
        [N] float64: the probability of each item in a stray purchase, 0 for PAD.
    """

    n_brands: int
    loyalty: float
    successor: NDArray[np.int64]
    stray: NDArray[np.float64]

    @property
    def n_types(self) -> int:
        """The number of types of each brand."""
        return len(self.successor)

    def brand_and_type(self, items: NDArray[np.integer]) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """Return the brands and the types of dense ``items`` of any shape."""
        brand, kind = np.divmod(items - 1, self.n_types)
        return brand, kind

    def next_item(self, log: InteractionLog, rows: Rows) -> NDArray[np.float64]:
        """Return the true probability of each item to be the target of each row, [R, N] float64, given the whole history.

        The favourite brand is uniform at first. Each item that continues the order of types is evidence for its brand, by the
        ratio of its probabilities with and without that favourite (Bayes).
        """
        starts = log.offsets[rows.users]
        lengths = rows.ends - starts
        row = np.repeat(np.arange(len(rows)), lengths)
        step = np.arange(len(row)) - (np.cumsum(lengths) - lengths)[row]
        row, at = row[step > 0], (starts[row] + step)[step > 0]
        brand, kind = self.brand_and_type(log.items[at])
        continues = kind == self.successor[self.brand_and_type(log.items[at - 1])[1]]
        odds = np.log1p(continues * self.loyalty / ((1 - self.loyalty) * self.stray[log.items[at]]))
        evidence = np.bincount(row * self.n_brands + brand, odds, len(rows) * self.n_brands).reshape(len(rows), -1)
        favourite = np.exp(evidence - evidence.max(1, keepdims=True))
        favourite /= favourite.sum(1, keepdims=True)

        wanted = self.successor[self.brand_and_type(log.items[rows.ends - 1])[1]]
        probability = np.tile((1 - self.loyalty) * self.stray, (len(rows), 1))
        columns = 1 + wanted[:, None] + np.arange(self.n_brands) * self.n_types
        probability[np.arange(len(rows))[:, None], columns] += self.loyalty * favourite
        return probability


@dataclass(frozen=True, eq=False, kw_only=True)
class SyntheticLog(InteractionLog):
    """A log from :func:`synthetic_log`, with the shop that it was drawn from."""

    shop: Shop


def synthetic_log(
    *,
    n_users: int = 3000,
    n_items: int = 600,
    n_brands: int = 20,
    mean_length: float = 12.0,
    loyalty: float = 0.6,
    seed: int = 0,
) -> SyntheticLog:
    """Draw a log of ``n_users`` users and ``n_items`` products, PAD not counted. Equal arguments give equal logs.

    Lengths are 5 plus a geometric random number, ``mean_length`` on average. ``times`` are seconds since 1970. Raw ids look
    like ``user-0042`` and ``brand07-type12``. Raises :class:`InputError` for arguments out of range.
    """
    for name, value, holds, expected in (
        ("n_users", n_users, n_users >= 1, "at least 1"),
        ("n_brands", n_brands, n_brands >= 1, "at least 1"),
        (
            "n_items",
            n_items,
            n_items >= 2 * n_brands and n_items % n_brands == 0,
            f"a multiple of n_brands, which is {n_brands}, and at least twice it",
        ),
        ("mean_length", mean_length, mean_length > MIN_LENGTH, f"greater than {MIN_LENGTH}"),
        ("loyalty", loyalty, 0 < loyalty < 1, "between 0 and 1"),
        ("seed", seed, 0 <= seed < 2**64, "in 0..2**64-1"),
    ):
        if not holds:
            raise InputError(f"{name} must be {expected}, but got {value}.")
    key = _random.root_key(seed)
    shop = _shop(key, n_items, n_brands, loyalty)

    # 1 - u is in (0, 1], so the logarithm is finite.
    stop = 1 / (mean_length - MIN_LENGTH + 1)
    u = _uniforms(_random.fold(key, 1), n_users, 3)
    lengths = MIN_LENGTH + (np.log(1 - u[:, 0]) / math.log1p(-stop)).astype(np.int64)
    favourite = (u[:, 1] * n_brands).astype(np.int64)
    opened = FIRST_DAY + u[:, 2] * SECONDS_A_YEAR

    draws = _uniforms(_random.fold(key, 2), n_users * int(lengths.max()), 3).reshape(n_users, -1, 3)
    items = np.minimum(np.searchsorted(np.cumsum(shop.stray[1:]), draws[..., 0], "right") + 1, n_items)
    for t in range(1, items.shape[1]):
        wanted = 1 + favourite * shop.n_types + shop.successor[shop.brand_and_type(items[:, t - 1])[1]]
        items[:, t] = np.where(draws[:, t, 1] < loyalty, wanted, items[:, t])
    gaps = -MEAN_GAP_SECONDS * np.log(1 - draws[..., 2])
    times = (opened[:, None] + np.cumsum(gaps, axis=1)).astype(np.int64)

    # Settings of a run can name the sizes and the seed only.
    others = {"n_brands": n_brands, "mean_length": mean_length, "loyalty": loyalty}
    named = others.items() <= (synthetic_log.__kwdefaults__ or {}).items()
    sizes = {"path": None, "synthetic_users": n_users, "synthetic_items": n_items, "synthetic_seed": seed}
    inside = np.arange(items.shape[1]) < lengths[:, None]
    brand, kind = shop.brand_and_type(np.arange(1, n_items + 1))
    return SyntheticLog(
        items=items[inside].astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        times=times[inside],
        user_ids=np.array([f"user-{n:04d}" for n in range(1, n_users + 1)], dtype=object),
        item_ids=np.array(["", *(f"brand{b:02d}-type{k:02d}" for b, k in zip(brand, kind, strict=True))], dtype=object),
        name=f"synthetic shop (seed {seed})",
        synthetic=True,
        source=sizes if named else None,
        shop=shop,
    )


def best_possible(log: SyntheticLog, rows: Rows, ks: Sequence[int] = (5, 10, 20)) -> dict[str, float]:
    """Return the scores on ``rows`` of the best possible ranking, under the names ``recall@k`` and ``ndcg@k``.

    That ranking orders all items but PAD, including the items of the history, by their true probability given the whole
    history, and ties by id. No model has a better score on average. On a finite set of rows a model can be better by luck,
    within the sampling error. Raises :class:`InputError` if there is no row.
    """
    if not len(rows):
        raise InputError("rows must hold a row to rank, but are empty.")
    # The probabilities of a batch are a matrix, so a batch has few rows where there are many items.
    batch = max(1, min(1024, BATCH_NUMBERS // log.n_items))
    rank = np.concatenate([_true_ranks(log, rows, begin, begin + batch) for begin in range(0, len(rows), batch)])
    scores = {f"recall@{k}": float((rank < k).mean()) for k in ks}
    return scores | {f"ndcg@{k}": float(np.where(rank < k, 1 / np.log2(rank + 2), 0).mean()) for k in ks}


def _true_ranks(log: SyntheticLog, rows: Rows, begin: int, end: int) -> NDArray[np.int64]:
    """Return the 0-based ranks of the targets of the rows begin..end-1 by true probability."""
    part = Rows(rows.users[begin:end], rows.ends[begin:end])
    probability, target = log.shop.next_item(log, part)[:, 1:], part.targets(log)[:, None] - 1
    own = np.take_along_axis(probability, target, axis=1)
    before = (probability > own) | ((probability == own) & (np.arange(probability.shape[1]) < target))
    return np.asarray(before.sum(1))


def _shop(key: _random.Key, n_items: int, n_brands: int, loyalty: float) -> Shop:
    n_types = n_items // n_brands
    u = _uniforms(_random.fold(key, 0), n_items, 2)
    cycle = np.argsort(u[:n_types, 0], kind="stable")
    successor = np.empty(n_types, dtype=np.int64)
    successor[cycle] = np.roll(cycle, -1)
    place = np.argsort(np.argsort(u[:, 1], kind="stable"), kind="stable")
    weight = (1.0 + place) ** -ZIPF_EXPONENT
    return Shop(n_brands, loyalty, successor, np.concatenate(([0.0], weight / weight.sum())))


def _uniforms(key: _random.Key, rows: int, columns: int) -> NDArray[np.float64]:
    """Return uniform numbers [rows, columns] in [0, 1). There are at most 4 columns."""
    zero = torch.zeros((), dtype=torch.int64)
    words = _random.philox((torch.arange(rows), zero, zero, zero), key)
    return np.stack([word.numpy() for word in words[:columns]], axis=1) / 2**32
