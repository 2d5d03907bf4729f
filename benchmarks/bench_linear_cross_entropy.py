"""Time linear_cross_entropy on the CPU against eager PyTorch, and against PyTorch that works on pieces to save memory."""

import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional as F

from benchmarks import ROOT, harness
from lares_fast import ops

D = 64
CHECK = "losses and gradients agree to 1e-4 of the largest"


def case(M, N):
    generator = torch.Generator().manual_seed(0)
    hidden, items = torch.randn(M, D, generator=generator), torch.randn(N, D, generator=generator) * 0.3
    return hidden.requires_grad_(), items.requires_grad_(), torch.randint(0, N, (M,), generator=generator)


def eager(hidden, items, target):
    return F.cross_entropy(hidden @ items.T, target, reduction="none")


def own(hidden, items, target):
    return (hidden * items[target]).sum(1)


class ItemPieces(torch.autograd.Function):
    """Cross-entropy of ``size`` items at a time. The backward pass computes the probabilities again."""

    @staticmethod
    def forward(ctx, hidden, items, target, size):
        lse = torch.stack([(hidden @ piece.T).logsumexp(1) for piece in items.split(size)]).logsumexp(0)
        ctx.save_for_backward(hidden, items, target, lse)
        ctx.size = size
        return lse - own(hidden, items, target)

    @staticmethod
    def backward(ctx, grad):
        hidden, items, target, lse = ctx.saved_tensors
        d_hidden, d_items = torch.zeros_like(hidden), torch.empty_like(items)
        weighted = hidden * grad[:, None]
        for piece, out in zip(items.split(ctx.size), d_items.split(ctx.size), strict=True):
            p = (hidden @ piece.T).sub_(lse[:, None]).exp_()
            torch.mm(p.T, weighted, out=out)
            d_hidden.addmm_(p, piece)
        d_hidden.sub_(items[target]).mul_(grad[:, None])
        d_items.index_add_(0, target, weighted, alpha=-1)
        return d_hidden, d_items, None, None


class RowPieces(torch.autograd.Function):
    """Cross-entropy of ``size`` rows at a time. The backward pass computes the probabilities again."""

    @staticmethod
    def forward(ctx, hidden, items, target, size):
        lse = torch.cat([(rows @ items.T).logsumexp(1) for rows in hidden.split(size)])
        ctx.save_for_backward(hidden, items, target, lse)
        ctx.size = size
        return lse - own(hidden, items, target)

    @staticmethod
    def backward(ctx, grad):
        hidden, items, target, lse = ctx.saved_tensors
        d_hidden, d_items = torch.empty_like(hidden), torch.zeros_like(items)
        weighted = hidden * grad[:, None]
        pieces = zip(*(x.split(ctx.size) for x in (hidden, lse, weighted, d_hidden)), strict=True)
        for rows, of_rows, factor, out in pieces:
            p = (rows @ items.T).sub_(of_rows[:, None]).exp_()
            torch.mm(p, items, out=out)
            d_items.addmm_(p.T, factor)
        d_hidden.sub_(items[target]).mul_(grad[:, None])
        d_items.index_add_(0, target, weighted, alpha=-1)
        return d_hidden, d_items, None, None


def native(hidden, items, target):
    return ops.linear_cross_entropy(hidden, items, target, reduction="none", backend="native")


def contenders(hidden, items, target, sizes):
    losses = {"torch eager": lambda: eager(hidden, items, target)}
    for kind, name, pieces in ((ItemPieces, "items", sizes[0]), (RowPieces, "rows", sizes[1])):
        for size in pieces:
            losses[f"torch, {size} {name} at a time"] = lambda kind=kind, size=size: kind.apply(hidden, items, target, size)
    losses["native"] = lambda: native(hidden, items, target)
    return losses


def agree(found, expected):
    return all((a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(found, expected, strict=True))


def forward_runs(M, N, sizes):
    hidden, items, target = case(M, N)

    def without_grad(loss):
        with torch.no_grad():
            return loss()

    runs = {name: lambda loss=loss: without_grad(loss) for name, loss in contenders(hidden, items, target, sizes).items()}
    runs["native, with rank"] = lambda: without_grad(
        lambda: ops.target_logprob_and_rank(hidden, items, target, backend="native")
    )
    expected = runs["torch eager"]()
    for name, run in runs.items():
        found = run()
        assert agree([-found[0] if isinstance(found, tuple) else found], [expected]), name
    return runs


def training_runs(M, N, sizes):
    hidden, items, target = case(M, N)
    losses = contenders(hidden, items, target, sizes)
    runs = {name: lambda loss=loss: torch.autograd.grad(loss().mean(), (hidden, items)) for name, loss in losses.items()}
    expected = runs["torch eager"]()
    for name, run in runs.items():
        assert agree(run(), expected), name
    return runs


@pytest.mark.parametrize("N", [12_101, pytest.param(1_000_000, marks=pytest.mark.large)])
def test_forward(compare, N):
    compare("cross entropy, forward", f"M256 N{N} D{D}", forward_runs(256, N, ((4096, 65_536), (16, 64))), CHECK, rounds=5)


@pytest.mark.parametrize(("M", "N"), [(1024, 24_588), (256, 12_101)])
def test_forward_and_backward(compare, M, N):
    sizes = ((256, 1024, 4096), (64, 256))
    compare("cross entropy, both", f"M{M} N{N} D{D}", training_runs(M, N, sizes), CHECK, rounds=7)


@pytest.mark.parametrize(("J", "M"), [(4, 1024)])
def test_batched_forward_and_backward(compare, J, M):
    """The contrastive losses of phase 1: J catalogs of M items, one target a row."""
    generator = torch.Generator().manual_seed(0)
    hidden, items = (F.normalize(torch.randn(J, M, D, generator=generator), dim=-1).requires_grad_() for _ in range(2))
    target = torch.arange(M).expand(J, M)
    runs = {
        "torch eager": lambda: F.cross_entropy((hidden @ items.mT / 0.07).flatten(0, 1), target.flatten()),
        "native": lambda: ops.linear_cross_entropy(hidden, items, target, scale=1 / 0.07, backend="native"),
    }
    runs = {name: lambda loss=loss: torch.autograd.grad(loss(), (hidden, items)) for name, loss in runs.items()}
    assert agree(runs["native"](), runs["torch eager"]())
    compare("cross entropy of catalogs, both", f"J{J} M{M} N{M} D{D}", runs, CHECK, rounds=7)


@pytest.mark.large
def test_share_of_peak(note):
    hidden, items, target = case(1024, 24_588)
    flops = 2 * 1024 * 24_588 * D
    with torch.no_grad():
        forward = harness.share_of_peak(
            "cross entropy, forward", f"M1024 N24588 D{D}", lambda: native(hidden, items, target), flops
        )
    both = lambda: torch.autograd.grad(native(hidden, items, target).mean(), (hidden, items))  # noqa: E731
    note(forward + harness.share_of_peak("cross entropy, both", f"M1024 N24588 D{D}", both, 4 * flops))


@pytest.mark.large
def test_threads(compare):
    hidden, items, target = case(1024, 24_588)

    def on(threads):
        torch.set_num_threads(threads)
        try:
            loss = native(hidden, items, target)
            return loss, *torch.autograd.grad(loss.mean(), (hidden, items))
        finally:
            torch.set_num_threads(1)

    assert all(torch.equal(a, b) for a, b in zip(on(1), on(2), strict=True))
    runs = {"native, 1 thread": lambda: on(1), "native, 2 threads": lambda: on(2)}
    shape = f"M1024 N24588 D{D}"
    compare("cross entropy, wall time", shape, runs, "both give the same bits", rounds=7, clock=time.perf_counter)


_MEMORY = """
import sys
from benchmarks.memory import extra_mib
import torch
from lares_fast import ops
torch.set_num_threads(1)
M, N, D, train = map(int, sys.argv[1:])
hidden, items = torch.randn(M, D, requires_grad=bool(train)), torch.randn(N, D, requires_grad=bool(train))
target = torch.randint(0, N, (M,))
def step(hidden, items, target):
    loss = ops.linear_cross_entropy(hidden, items, target, backend="native")
    return loss.backward() if train else loss
step(hidden[:1], items[:1000], target[:1] % 1000)
hidden.grad = items.grad = None
print(extra_mib(lambda: step(hidden, items, target)))
"""


@pytest.mark.large
@pytest.mark.parametrize(("M", "N", "train"), [(256, 1_000_000, False), (1024, 24_588, True)])
def test_memory(note, M, N, train):
    """Measure the peak memory of one call in its own process, without the inputs and the gradients."""
    arguments = [sys.executable, "-c", _MEMORY, *map(str, (M, N, D, int(train)))]
    extra = float(subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    extra -= train * (M + N) * D * 4 / 2**20
    assert extra <= 32, f"{extra:.1f} MiB"
    note([harness.Fact("cross entropy", f"M{M} N{N} D{D}{' both' * train}", "peak extra MiB", extra)])
