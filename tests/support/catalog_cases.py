"""Catalogs, exclusion lists and backends that the tests of several ops share."""

import pytest
import torch

from lares_fast import _native

needs_native = pytest.mark.skipif(not _native.available()[0], reason=_native.available()[1])
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


def integers(*shape):
    """Return small whole numbers, whose sums of products are exact and often tie."""
    return torch.randint(-2, 3, shape).float()


def csr(lists):
    offsets = torch.tensor([0, *[len(x) for x in lists]]).cumsum(0)
    return offsets, torch.tensor([i for x in lists for i in x], dtype=torch.int64)


def catalog(kind, N, D):
    """Return (query, items) that are easy, hard or impossible for screening."""
    query, items = torch.randn(21, D), torch.randn(N, D)
    if kind == "cone":
        items = torch.randn(D) + 0.05 * items
    elif kind == "one large dimension":
        items[:, 0] *= 30
    elif kind == "one large dimension that queries ignore":
        items[:, 0] *= 30
        query[:, 0] = 0
    elif kind == "ascending scores":
        query = torch.randn(D) + 0.1 * query
        items = items[(items @ query[0]).argsort()]
    elif kind == "massed ties":
        query, items = integers(21, D), integers(N, D)
    elif kind == "one item":
        items = items[:1].repeat(N, 1)
    elif kind == "not finite":
        items[::61] = torch.nan
        items[5::1009, 0] = torch.inf
        query[0], query[1], query[2] = 0, torch.nan, torch.inf
    elif kind == "huge":
        items = items * 1e19
    elif kind == "tiny":
        items = items * 1e-36
    return query, items


CATALOGS = [
    "Gaussian", "cone", "one large dimension", "one large dimension that queries ignore", "ascending scores", "massed ties",
    "one item", "not finite", "huge", "tiny",
]  # fmt: skip
