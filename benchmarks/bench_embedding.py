"""Time the input of the pre-block, forward and backward, against PyTorch's modules on the same packed rows."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks import harness
from lares_fast import ops
from lares_fast._random import Draw, seed_of

N, D, L = 24_588, 64, 20
CHECK = "results within 1e-5"


def inputs(B, device):
    """Return items, offsets, positions and the parameters of B sequences, mostly short, with gradients."""
    generator = torch.Generator().manual_seed(0)
    lengths = 1 + (torch.rand(B, generator=generator).square() * L).long()
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    position = torch.cat([torch.arange(int(n)) for n in lengths])
    items = torch.randint(1, N, (len(position),), generator=generator)
    leaves = [torch.randn(size, generator=generator).to(device).requires_grad_() for size in ((N, D), (L, D), (D,), (D,))]
    return items.to(device), offsets.to(device), position.to(device), leaves


def modules(items, position, item_table, position_table, weight, bias, p):
    return F.dropout(
        F.layer_norm(F.embedding(items, item_table) + F.embedding(position, position_table), (D,), weight, bias), p
    )


def compared(B, device, backend):
    """Return the candidates for ``compare``; their results are equal without dropout."""
    items, offsets, position, leaves = inputs(B, device)
    draw = Draw(seed_of((1, 2), torch.device(device)), torch.arange(B, device=device))

    def step(p):
        theirs = lambda: modules(items, position, *leaves, p)  # noqa: E731
        ours = lambda: ops.embedding(items, offsets, *leaves, draw=draw, dropout=p, eps=1e-5, backend=backend)  # noqa: E731
        return {"PyTorch's modules": theirs, backend: ours}

    expected, found = (call() for call in step(0.0).values())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def training(call):
        return lambda: torch.autograd.grad(call(), leaves, torch.ones_like(expected))

    return {name: training(call) for name, call in step(0.5).items()}


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_cpu(compare, backend):
    compare("embedding", f"training B1024 D{D} N{N}", compared(1024, "cpu", backend), CHECK)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the Triton kernels run on a GPU, and this machine has none")
@pytest.mark.parametrize("B", [1024, 3072])
def test_gpu(compare, B):
    def finished(run):
        def timed():
            run()
            torch.cuda.synchronize()

        return timed

    candidates = {name: finished(run) for name, run in compared(B, "cuda", "triton").items()}
    compare("embedding, wall time", f"training B{B} D{D} N{N}", candidates, CHECK, clock=harness.time.perf_counter)
