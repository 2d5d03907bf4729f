"""Time target_rank on the CPU against counting in PyTorch, over all scores at once and in chunks with reused buffers."""

import pytest
import torch

from lares_fast import ops

B, D = 256, 64
CHUNK = 65_536
CHECK = "ranks differ from torch's by at most 3, as near ties round"


def torch_full(query, items, target):
    scores = query @ items.T
    return (scores > scores.gather(1, target[:, None])).sum(1)


class TorchChunked:
    """Count 65,536 items at a time, in reused memory. Comparisons give floats, which PyTorch sums faster than booleans."""

    def __init__(self, query, items, target):
        self.arguments = query, items, target
        self.scores, self.better = torch.empty(2, len(query) * min(CHUNK, len(items)))

    def __call__(self):
        query, items, target = self.arguments
        own = (query * items[target]).sum(1, keepdim=True)
        rank = torch.zeros(len(query))
        for piece in items.split(CHUNK):
            shape = len(query), len(piece)
            scores, better = (buffer[: shape[0] * shape[1]].view(shape) for buffer in (self.scores, self.better))
            rank += torch.gt(torch.mm(query, piece.T, out=scores), own, out=better).sum(1)
        return rank.long()


def candidates(N):
    """Return all candidates, after checking the result of each."""
    generator = torch.Generator().manual_seed(0)
    items, query = torch.randn(N, D, generator=generator), torch.randn(B, D, generator=generator)
    target = torch.randint(0, N, (B,), generator=generator)
    seen = torch.randint(0, N, (50 * B,), generator=generator)
    exclude = (torch.arange(B + 1) * 50, seen)
    chunked = TorchChunked(query, items, target)
    runs = {
        "torch, all scores": lambda: torch_full(query, items, target),
        "torch, chunks in reused buffers": chunked,
        "native, 50 exclusions a query": lambda: ops.target_ranks(query, items, target, exclude, backend="native")[0],
        "native": lambda: ops.target_rank(query, items, target, backend="native"),
    }
    expected = torch_full(query, items, target)
    for name, run in runs.items():
        assert ((run() - expected).abs() <= 3).all(), name
    return runs


@pytest.mark.parametrize("N", [12_101, 100_000])
def test_small(compare, N):
    compare("target_rank", f"B{B} N{N} D{D}", candidates(N), CHECK, rounds=7)


@pytest.mark.large
def test_large(compare):
    compare("target_rank", f"B{B} N1000000 D{D}", candidates(1_000_000), CHECK, rounds=5)
