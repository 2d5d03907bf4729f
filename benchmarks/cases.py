"""Models and batches that several suites time."""

import torch

import lares_fast
from lares_fast import LARESConfig, reference
from lares_fast._random import Draw

N = 24_588


def lengths(kind, batch, longest):
    """``short``: the mean of the Amazon logs' training rows, about 6; ``full``: every sequence has all ``longest`` items."""
    if kind == "full":
        return torch.full((batch,), longest)
    generator = torch.Generator().manual_seed(1)
    return (1 + torch.empty(batch).geometric_(0.18, generator=generator).long()).clamp(max=longest)


def sequences(kind, batch, longest):
    generator = torch.Generator().manual_seed(2)
    item_seq_len = lengths(kind, batch, longest)
    items = torch.randint(1, N, (batch, longest), generator=generator)
    return torch.where(torch.arange(longest) < item_seq_len[:, None], items, 0), item_seq_len


def models():
    """(reference, lares_fast) with the same weights, published sizes."""
    torch.manual_seed(0)
    slow = reference.LARES(LARESConfig(n_items=N))
    fast = lares_fast.LARES(slow.config)
    fast.load_state_dict(slow.state_dict())
    return slow, fast


def draw(number, batch):
    return Draw((number, 0), torch.arange(batch))
