"""Catalogs, exclusion lists, backends and direct calls of the native backends, for the tests of several ops."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lares_fast import _dispatch, _native
from lares_fast.ops import _target_rank_native, _topk_native
from lares_fast.ops._catalog_calls import TargetRankCall, TopkCall

needs_native = pytest.mark.skipif(not _native.available()[0], reason=_native.available()[1])
BACKENDS = ["reference", pytest.param("native", marks=needs_native)]


def integers(*shape):
    """Return a tensor whose sums of products are exact. Many scores are equal."""
    return torch.randint(-2, 3, shape).float()


def csr(lists):
    offsets = torch.tensor([0, *[len(x) for x in lists]]).cumsum(0)
    return offsets, torch.tensor([i for x in lists for i in x], dtype=torch.int64)


def catalog(kind, N, D):
    """Return (query, items) of a kind that is easy, hard or impossible to screen."""
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


def whole_numbers(seed, batch, count, width, *, values=2, with_bias=True, longest=None):
    """Return (query, items, bias, exclude) of small whole numbers: every sum is exact, and many scores are equal.

    The lists of exclusions are unsorted and repeat.
    """
    rng = np.random.default_rng(seed)
    query = torch.from_numpy(rng.integers(-values, values + 1, (batch, width)).astype(np.float32))
    items = torch.from_numpy(rng.integers(-values, values + 1, (count, width)).astype(np.float32))
    bias = torch.from_numpy(rng.integers(-3, 4, count).astype(np.float32)) if with_bias else None
    exclude = None
    if longest is not None:
        lists = [rng.integers(0, count, rng.integers(0, longest + 1)) for _ in range(batch)]
        offsets = np.cumsum([0, *map(len, lists)])
        exclude = torch.from_numpy(offsets), torch.from_numpy(np.concatenate([np.empty(0, np.int64), *lists]))
    return query, items, bias, exclude


def same(got, wanted):
    """Compare bit by bit."""
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=False)


def native_topk(*arguments, threads=None, **options):
    return _topk_native.run(TopkCall.build(*arguments, **options), threads)


def native_ranks(*arguments, threads=None, **options):
    return _target_rank_native.run(TargetRankCall.build(*arguments, **options), threads)


def plant(monkeypatch, op, backend, bug):
    """Replace the function ``run`` with which ``backend`` runs ``op`` by ``bug(run)``."""
    row = [replace(own, run=bug(own.run)) if own.name == backend else own for own in _dispatch._TABLE[op]]
    monkeypatch.setitem(_dispatch._TABLE, op, tuple(row))
