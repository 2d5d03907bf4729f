"""How alike the states of different users are. If they are equal, all users get the same items: the model has collapsed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast._transfer import to_host


class Cosines:
    """The mean, and the root of the mean square, of the cosines between each two of many vectors, which come in batches.

    Both are 1 if all vectors have one direction. The root is 1 also if half of them have the opposite direction, where the mean
    is 0; so it shows that all vectors lie on one line. Of D random numbers each, it is 1 / sqrt(D). A vector of zeros has the
    cosine 0 with every other.

    No pair is computed. The sum of all cosines is the squared length of the sum of the normalised vectors, and the sum of
    their squares is the squared norm of the matrix of second moments [D, D].
    """

    def __init__(self) -> None:
        # The sum of the normalised vectors, their second moments, and the numbers of pairs of a vector with itself.
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._count = 0

    def add(self, vectors: Tensor) -> None:
        """Take ``vectors`` [B, D] on any device. Nothing waits for a GPU."""
        unit = F.normalize(vectors.double(), dim=-1)
        sums = unit.sum(0), unit.T @ unit, unit.square().sum()
        self._sums = sums if self._sums is None else tuple(map(torch.add, self._sums, sums))  # type: ignore[assignment]
        self._count += len(vectors)

    def values(self) -> tuple[float, float] | None:
        """Return the mean and the root of the mean square, or ``None`` for fewer than two vectors. A GPU is waited for."""
        if self._sums is None or self._count < 2:
            return None
        total, moments, own = self._sums
        cosines, squares, own_ = to_host(torch.stack((total.square().sum(), moments.square().sum(), own))).tolist()
        pairs = self._count * (self._count - 1)
        return (cosines - own_) / pairs, math.sqrt(max(0.0, squares - own_) / pairs)
