"""Same-target partners: for a training row, another training row with the same target item."""

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
    """Rows grouped by target item. It is built in O(R log R) and holds three integers a row and two an item."""

    def __init__(self, log: InteractionLog, rows: Rows) -> None:
        """``rows`` must be the training rows, because the targets of all rows here reach training.

        Raises :class:`InputError` if there is no row.
        """
        if not len(rows):
            raise InputError("rows must hold a training row, but are empty: give a split that leaves something to train on.")
        targets = rows.targets(log)
        counts = np.bincount(targets, minlength=log.n_items)
        begins = np.cumsum(counts) - counts
        self._grouped: NDArray[np.int64] = np.argsort(targets, kind="stable")
        # The index of each row in _grouped.
        self._place = np.empty_like(self._grouped)
        self._place[self._grouped] = np.arange(len(rows))
        self._targets, self._begins, self._counts = targets, begins, counts

    def sample(self, index: Tensor | NDArray[Any], generator: torch.Generator) -> Tensor:
        """Return one partner row, [B] int64, for each row in ``index`` [B].

        The partner is drawn uniformly from the other rows with the same target, independently of all other draws. A row
        without others is its own partner. Each row takes O(1) time. The probabilities are uniform to within a relative error
        of 2**-30.
        """
        chosen = np.asarray(index, dtype=np.int64)
        target = self._targets[chosen]
        others = self._counts[target] - 1
        draw = torch.randint(2**62, (len(chosen),), generator=generator).numpy()
        place = self._begins[target] + draw % np.maximum(others, 1)
        # The row itself is skipped, unless it is alone.
        place += (place >= self._place[chosen]) & (others > 0)
        return torch.from_numpy(self._grouped[place])
