"""Round the sizes of a batch up to a few, so that a GPU can replay the launches of earlier steps.

Filler sequences are real items of the log. They take part in no loss: no table of a batch names their states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lares_fast import reference
from lares_fast._random import Draw, Key, seed_of
from lares_fast.data import InteractionLog, Rows
from lares_fast.data.batch import Places


class Sizes(NamedTuple):
    """The sizes of a full batch.

    ``tokens, longest, repeats``
        The mean number of packed items, the items of the longest sequence, and how many times the model encodes each item.
    ``trajectories``
        The number of trajectories through the model: sequences times ``repeats``.
    ``scored``
        The mean number of states that are scored against all items.
    ``parts``
        The tokens are rounded up to multiples of about the mean divided by ``parts``.
    """

    tokens: float
    longest: int
    repeats: int
    trajectories: int
    scored: int
    parts: int


@dataclass(frozen=True)
class Padding:
    """The sizes that a batch is rounded up to.

    ``fillers``
        The number of filler sequences.
    ``tokens, depth, states``
        The number of packed items, the bound of the depths, and the number of states that phase 2 scores are rounded up to
        multiples of these numbers.
    """

    fillers: int = 0
    tokens: int = 1
    depth: int = 1
    states: int = 1

    @classmethod
    def of(cls, sizes: Sizes, mean_depth: int) -> Padding:
        """Return the padding of full batches."""
        if sizes.longest == 1:
            return cls(depth=mean_depth, states=sizes.trajectories)
        tokens = 2 ** round(math.log2(max(1.0, sizes.tokens / sizes.parts)))
        # With so many sequences of 1 to ``longest`` items, any number of missing items can be filled.
        return cls(-(-(tokens - 1) // (sizes.longest - 1)), tokens, mean_depth, sizes.trajectories)

    def places(self, log: InteractionLog, rows: Rows, index: Tensor, max_len: int, n_targets: int) -> Places:
        """Return the places of the rows ``index`` [S] of ``rows``, and after them the fillers."""
        chosen = index.numpy()
        ends = rows.ends[chosen]
        starts = np.maximum(log.offsets[rows.users[chosen]], ends - max_len)
        lengths = np.concatenate((ends - starts, self._lengths(int((ends - starts).sum()))))
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths)))
        # A filler has the last items of the log, and an item follows it.
        starts = np.concatenate((starts, log.n_events - 1 - lengths[len(chosen) :]))
        return Places(torch.from_numpy(starts), torch.from_numpy(offsets), int(offsets[-1]), n_targets)

    def _lengths(self, n_tokens: int) -> NDArray[np.int64]:
        """Return the lengths of the fillers behind ``n_tokens`` items, [fillers] int64, each at least 1."""
        if not self.fillers:
            return np.zeros(0, np.int64)
        missing = -(-(n_tokens + self.fillers) // self.tokens) * self.tokens - n_tokens
        return missing // self.fillers + (np.arange(self.fillers) < missing % self.fillers)

    def deepest(self, num_steps: Tensor) -> int:
        """Return the bound of the depths ``num_steps``."""
        return -(-int(num_steps.max()) // self.depth) * self.depth

    def scored(self, num_steps: Tensor) -> int:
        """Return the number of states that phase 2 scores, for the depths ``num_steps`` of the rows without fillers."""
        return -(-int(num_steps.sum()) // self.states) * self.states


# Sizes as they are, for batches that are not full.
EXACT = Padding()


def padded_pass(num_steps: Tensor, key: Key, padding: Padding | None) -> reference.Pass:
    """Return the choices of G passes over B rows with the depths ``num_steps`` [G, B], and over the fillers of ``padding``.

    With a padding, the key is a tensor and there is a bound of the depths, as a GPU needs them. Fillers take one step. They do
    not change the random numbers of the rows.
    """
    passes, batch = num_steps.shape
    rows = torch.arange(passes * batch).view(passes, batch)
    if padding is None:
        return reference.Pass(num_steps, Draw(key, rows.flatten()))
    fillers = passes * batch + torch.arange(passes * padding.fillers).view(passes, -1)
    draw = Draw(seed_of(key, torch.device("cpu")), torch.cat((rows, fillers), 1).flatten())
    return reference.Pass(F.pad(num_steps, (0, padding.fillers), value=1), draw, deepest=padding.deepest(num_steps))
