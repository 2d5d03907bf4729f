"""``ops.topk`` and ``ops.target_ranks`` on a CUDA device; tests/emulator runs the same kernels without one."""

import pytest
import torch

from lares_fast import _dispatch, ops, reference
from tests.support import oracle

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
DEVICE = "cuda"


def integers(*shape):
    return torch.randint(-2, 3, shape, device=DEVICE).float()


def lists(B, N, longest=6):
    sizes = torch.randint(0, longest + 1, (B,), device=DEVICE)
    offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    return offsets, torch.randint(0, N, (int(offsets[-1]),), device=DEVICE)


@pytest.fixture(params=["3xtf32", "ffma"], autouse=True)
def products(request, monkeypatch):
    monkeypatch.setenv("LARES_FAST_CUDA_PRODUCTS", request.param)


def test_one_hot_products_find_every_place_of_a_tile():
    # Each query has one dimension: a fragment that is read from a wrong place changes a score.
    for D in (8, 40):
        query, items = torch.eye(D, device=DEVICE), torch.arange(1.0, 64 * D + 1, device=DEVICE).view(64, D) % 97
        scores, ids = ops.topk(query, items, 64, backend="cuda")
        assert torch.equal(ids, items.T.argsort(dim=1, descending=True, stable=True))
        assert torch.equal(scores, items.T.gather(1, ids))


@pytest.mark.parametrize(("B", "N", "D", "k"), [(1, 1, 1, 1), (129, 65, 33, 65), (5, 5000, 64, 100), (70, 20_001, 50, 1024)])
def test_massed_ties_are_exact(B, N, D, k):
    query, items, bias, exclude = integers(B, D), integers(N, D), integers(N), lists(B, N)
    before = _dispatch.calls["topk", "cuda"]
    got = ops.topk(query, items, k, bias=bias, exclude=exclude)
    assert _dispatch.calls["topk", "cuda"] == before + 1
    wanted = reference.topk(query, items, k, bias=bias, exclude=exclude)
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[0], wanted[0])
    target = torch.randint(0, N, (B,), device=DEVICE)
    for ties in ("order", "strict"):
        of_all, of_kept = ops.target_ranks(query, items, target, exclude, ties=ties, backend="cuda")
        assert torch.equal(of_all, reference.target_rank(query, items, target, ties=ties))
        assert torch.equal(of_kept, reference.target_rank(query, items, target, exclude=exclude, ties=ties))


def test_gaussian_and_repeats():
    query, items = torch.randn(200, 64, device=DEVICE), torch.randn(100_003, 64, device=DEVICE)
    first = ops.topk(query, items, 100, backend="cuda")
    oracle.check_topk(first[0].cpu(), first[1].cpu(), (query.double() @ items.double().T).cpu(), 100)
    for _ in range(20):
        again = ops.topk(query, items, 100, backend="cuda")
        assert torch.equal(again[1], first[1]) and torch.equal(again[0], first[0])


def test_capture_and_another_stream():
    query, items = integers(9, 16), integers(3000, 16)
    wanted = ops.topk(query, items, 20, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = ops.topk(query, items, 20, backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside[1], wanted[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.topk(query, items, 20, backend="cuda")
    query.copy_(-query)
    graph.replay()
    assert torch.equal(captured[1], reference.topk(query, items, 20)[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one CUDA device")
def test_the_current_device_stays():
    query, items = integers(3, 4).to("cuda:1"), integers(50, 4).to("cuda:1")
    ids = ops.topk(query, items, 5, backend="cuda")[1]
    assert torch.cuda.current_device() == 0
    assert torch.equal(ids, reference.topk(query, items, 5)[1])
