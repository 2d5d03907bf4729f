"""Same-target partners: for a training row, another training row that leads to the same item."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lares_fast._errors import InputError
from lares_fast.data.log import InteractionLog
from lares_fast.data.split import Rows


class SameTargetIndex:
    """Rows grouped by target item; two integers a row and one an item, built in O(R log R)."""

    def __init__(self, log: InteractionLog, rows: Rows) -> None:
        """``rows`` must be the training rows: any others would leak their targets into training.

        Raises :class:`InputError` if there is no row.
        """
        if not len(rows):
            raise InputError("rows must hold a training row, but are empty: give a split that leaves something to train on.")
        targets = rows.targets(log)
        counts = np.bincount(targets, minlength=log.n_items)
        begins = np.cumsum(counts) - counts
        self._grouped: NDArray[np.int64] = np.argsort(targets, kind="stable")
        self._place = np.empty_like(self._grouped)  # where each row stands in _grouped
        self._place[self._grouped] = np.arange(len(rows))
        self._targets, self._begins, self._counts = targets, begins, counts

    def sample(self, index: Tensor | NDArray[Any], generator: torch.Generator) -> Tensor:
        """One partner row [B] int64 for each row in ``index`` [B].

        Uniform among the other rows with the same target, independently of all other draws; the row itself
        where there is no other. O(1) a row. The law is uniform to within 2**-30 relative.
        """
        chosen = np.asarray(index, dtype=np.int64)
        target = self._targets[chosen]
        others = self._counts[target] - 1
        draw = torch.randint(2**62, (len(chosen),), generator=generator).numpy()
        place = self._begins[target] + draw % np.maximum(others, 1)
        # Skip the row itself; alone, it is its own partner.
        place += (place >= self._place[chosen]) & (others > 0)
        return torch.from_numpy(self._grouped[place])
