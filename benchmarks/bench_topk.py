"""topk on the CPU against torch: scores of the whole catalog, then torch.topk."""

import pytest
import torch

from lares_fast import ops

CASES = [(256, 12_101, 64, 100), (256, 100_000, 64, 100), (1, 100_000, 64, 100), (256, 12_101, 64, 10)]


@pytest.mark.parametrize(("B", "N", "D", "K"), CASES)
def test_topk(compare, B, N, D, K):
    generator = torch.Generator().manual_seed(0)
    query, items = torch.randn(B, D, generator=generator), torch.randn(N, D, generator=generator)
    buffer = torch.empty(B, N)

    def full():
        return torch.topk(query @ items.T, K)

    def reused():
        return torch.topk(torch.mm(query, items.T, out=buffer), K)

    _, expected = full()
    for backend in ("reference", "native"):
        _, ids = ops.topk(query, items, K, backend=backend)
        assert (ids == expected).double().mean() > 0.999
    candidates = {
        "torch mm + topk": full,
        "torch, buffer reused": reused,
        "reference": lambda: ops.topk(query, items, K, backend="reference"),
        "native": lambda: ops.topk(query, items, K, backend="native"),
    }
    compare("topk", f"B{B} N{N} D{D} K{K}", candidates, "ids equal torch's in > 99.9 % of places", rounds=5)
