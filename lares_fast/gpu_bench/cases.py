"""Batches and logs that several benchmarks use."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from lares_fast._random import Draw
from lares_fast.data import InteractionLog

N = 24_588
# The number of users in Amazon's Instruments. With leave-one-out they give about 340,000 training rows.
USERS = 57_439

# Shares of the training rows of Amazon's Instruments that have 1, 2, ... 20 items. The mean is 6.3 items.
INSTRUMENTS = (
    0.169, 0.169, 0.119, 0.0886, 0.0683, 0.0534, 0.0429, 0.0349, 0.0291, 0.0245,
    0.0209, 0.0181, 0.0157, 0.0137, 0.0119, 0.0105, 0.0091, 0.0080, 0.0071, 0.0855,
)  # fmt: skip


def lengths(kind: str, batch: int, longest: int) -> Tensor:
    """Return the lengths of ``batch`` sequences.

    ``full``: every sequence has ``longest`` items. ``instruments``: up to 20 items. ``mean 8.75``: up to 50 items.
    """
    if kind == "full":
        return torch.full((batch,), longest)
    generator = torch.Generator().manual_seed(1)
    if kind == "instruments":
        return 1 + torch.multinomial(torch.tensor(INSTRUMENTS), batch, replacement=True, generator=generator)
    return (1 + torch.empty(batch).geometric_(1 / 7.75, generator=generator).long()).clamp(max=longest)


def sequences(kind: str, batch: int, longest: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Return padded items [B, L] and their lengths [B], which are the lengths of ``lengths``."""
    generator = torch.Generator().manual_seed(seed)
    item_seq_len = lengths(kind, batch, longest)
    items = torch.randint(1, N, (batch, longest), generator=generator)
    return torch.where(torch.arange(longest) < item_seq_len[:, None], items, 0), item_seq_len


def draw(number: int, batch: int) -> Draw:
    """Return the draw with the number ``number`` for ``batch`` rows."""
    return Draw((number, 0), torch.arange(batch))


@cache
def instruments_log(n_users: int = USERS, n_items: int = N) -> InteractionLog:
    """Return an invented log with the size of Amazon's Instruments, whose training rows have the lengths of ``INSTRUMENTS``.

    A user with m training rows has one row of each length 1..m, so the shares of the lengths are the shares of users with at
    least so many rows. Popularity follows Zipf's law.
    """
    draw = np.random.default_rng(0)
    share = np.array(INSTRUMENTS[:19])
    # The rows of 20 items belong to few users with many rows. They go on from the share of rows with 19 items.
    longer = share[-1] - 0.0006
    at_least = np.append(share, longer) / share[0]
    rows = (draw.random(n_users)[:, None] < at_least).sum(1)
    rows += np.where(rows == len(at_least), draw.geometric(longer / INSTRUMENTS[19], n_users) - 1, 0)
    offsets = np.concatenate(([0], np.cumsum(rows + 3)))
    items = np.exp(draw.random(offsets[-1]) * np.log(n_items)).astype(np.int32)
    return InteractionLog(
        items=np.minimum(items, n_items - 1),
        offsets=offsets,
        user_ids=np.arange(n_users),
        item_ids=np.arange(n_items),
        name="invented, with the sizes of Instruments",
        synthetic=True,
    )
