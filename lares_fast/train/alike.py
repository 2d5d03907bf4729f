"""How alike the states of different users are. Equal states give all users the same items: the model has collapsed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast._transfer import to_host


class MeanCosine:
    """The mean cosine between each two of many vectors, which come in batches.

    It is 1 if all vectors have one direction, and near 0 if they have many. It needs memory for one vector only, because the
    sum of all cosines is the squared length of the sum of the normalised vectors. A vector of zeros has the cosine 0.
    """

    def __init__(self) -> None:
        # The sum of the normalised vectors, and the sum of their squared lengths, which are 1, or 0 for a vector of zeros.
        self._sums: tuple[Tensor, Tensor] | None = None
        self._count = 0

    def add(self, vectors: Tensor) -> None:
        """Take ``vectors`` [B, D] on any device. Nothing waits for a GPU."""
        unit = F.normalize(vectors.double(), dim=-1)
        sums = unit.sum(0), unit.square().sum()
        self._sums = sums if self._sums is None else (self._sums[0] + sums[0], self._sums[1] + sums[1])
        self._count += len(vectors)

    def value(self) -> float | None:
        """Return the mean cosine, or ``None`` for fewer than two vectors. A GPU is waited for."""
        if self._sums is None or self._count < 2:
            return None
        total, own = to_host(torch.stack((self._sums[0].square().sum(), self._sums[1]))).tolist()
        return (total - own) / (self._count * (self._count - 1))
