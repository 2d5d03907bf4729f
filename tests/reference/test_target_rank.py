"""Ranks in the total order, compared with a sort in fp64."""

import pytest
import torch

from lares_fast import reference
from lares_fast.reference.target_rank import target_ranks


@pytest.fixture(params=[32768, 7], ids=["one chunk", "many chunks"])
def chunk(request, monkeypatch):
    import importlib

    monkeypatch.setattr(importlib.import_module("lares_fast.reference.topk"), "_CHUNK", request.param)


def integers(*shape):
    return torch.randint(-2, 3, shape).float()


def expected(query, items, target, gone=()):
    ranks = []
    for b, t in enumerate(target.tolist()):
        scores = (query[b].double() @ items.double().T).tolist()
        order = sorted(
            (i for i in range(len(items)) if i == t or i not in (gone[b] if gone else ())), key=lambda i: (-scores[i], i)
        )
        ranks.append(order.index(t))
    return ranks


def test_massed_ties_follow_the_id(chunk):
    query, items, target = integers(20, 3), integers(40, 3), torch.randint(0, 40, (20,))
    assert reference.target_rank(query, items, target).tolist() == expected(query, items, target)


def test_exclusion_spares_the_target(chunk):
    query, items, target = integers(9, 3), integers(30, 3), torch.randint(0, 30, (9,))
    lists = [[*torch.randint(0, 30, (n,)).tolist(), t] for n, t in enumerate(target.tolist())]
    offsets = torch.tensor([0, *[len(x) for x in lists]]).cumsum(0)
    exclude = (offsets, torch.tensor([i for x in lists for i in x]))
    assert reference.target_rank(query, items, target, exclude=exclude).tolist() == expected(query, items, target, lists)
    both = target_ranks(query, items, target, (None, exclude))
    assert both[0].tolist() == expected(query, items, target)


def test_strict_ties_favour_the_target(chunk):
    query, items = torch.ones(1, 2), torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    for target in (0, 1, 3):
        assert reference.target_rank(query, items, torch.tensor([target]), ties="strict").item() == 1


def test_a_collapsed_model_earns_nothing(chunk):
    """If all items are equal, the rank of the target is its id, whatever the rounding of the scores."""
    query, items = torch.randn(33, 64), torch.randn(1, 64).expand(100, 64).contiguous()
    target = torch.arange(33) * 3
    assert torch.equal(reference.target_rank(query, items, target), target)


def test_nan_counts_as_the_worst(chunk):
    query, items = torch.ones(2, 1), torch.tensor([[torch.nan], [1.0], [-torch.inf], [torch.inf]])
    assert reference.target_rank(query, items, torch.tensor([0, 1])).tolist() == [2, 1]
    assert reference.target_rank(query, items, torch.tensor([2, 3])).tolist() == [3, 0]
