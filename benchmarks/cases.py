"""Batches that several benchmarks use."""

import torch

from lares_fast._random import Draw

N = 24_588

# Shares of the training rows of Amazon's Instruments that have 1, 2, ... 20 items. The mean is 6.3 items.
INSTRUMENTS = (
    0.169, 0.169, 0.119, 0.0886, 0.0683, 0.0534, 0.0429, 0.0349, 0.0291, 0.0245,
    0.0209, 0.0181, 0.0157, 0.0137, 0.0119, 0.0105, 0.0091, 0.0080, 0.0071, 0.0855,
)  # fmt: skip


def lengths(kind, batch, longest):
    """Return the lengths of ``batch`` sequences.

    ``full``: every sequence has ``longest`` items. ``instruments``: up to 20 items. ``mean 8.75``: up to 50 items.
    """
    if kind == "full":
        return torch.full((batch,), longest)
    generator = torch.Generator().manual_seed(1)
    if kind == "instruments":
        return 1 + torch.multinomial(torch.tensor(INSTRUMENTS), batch, replacement=True, generator=generator)
    return (1 + torch.empty(batch).geometric_(1 / 7.75, generator=generator).long()).clamp(max=longest)


def sequences(kind, batch, longest, seed=2):
    generator = torch.Generator().manual_seed(seed)
    item_seq_len = lengths(kind, batch, longest)
    items = torch.randint(1, N, (batch, longest), generator=generator)
    return torch.where(torch.arange(longest) < item_seq_len[:, None], items, 0), item_seq_len


def draw(number, batch):
    return Draw((number, 0), torch.arange(batch))
