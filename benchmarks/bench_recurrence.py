"""recurrence on the CPU, forward and backward, against packed PyTorch, and its share of the multiply-add peak."""

import harness
import packed_torch
import pytest
import torch

from lares_fast import LARESConfig, ops, reference
from lares_fast._random import Draw

D, INNER, HEADS, LAYERS, T = 64, 256, 2, 2, 4
CHECK = "without dropout both outputs agree to 1e-4"


def lengths(kind):
    if kind == "all 50":
        return torch.full((256,), 50)
    return torch.empty(1024).geometric_(1 / 7.3, generator=torch.Generator().manual_seed(0)).long().clamp(1, 50)


def case(kind, p):
    """(shape, forward and backward of ours and of the rivals, useful floating-point operations of a forward)."""
    torch.manual_seed(0)
    module = reference.Recurrence(LARESConfig(n_items=2, hidden_size=D, n_heads=HEADS, inner_size=INNER, n_core_layers=LAYERS))
    n = lengths(kind)
    P, B = int(n.sum()), len(n)
    weights, offsets = list(module.parameters()), torch.cat((torch.zeros(1, dtype=torch.int64), n.cumsum(0)))
    h, pre = torch.randn(P, D, requires_grad=True), torch.randn(P, D, requires_grad=True)
    plan, upstream = packed_torch.buckets(n), torch.randn(B, D)

    def ours(p=p):
        draw = Draw((1, 2), torch.arange(B)) if p else None
        return ops.recurrence(h, offsets, weights, n_heads=HEADS, pre=pre, depth=T, draw=draw, dropout=p, backend="native")

    def rival(sdpa, p=p):
        return packed_torch.recurrence(h, pre, n, plan, weights, HEADS, T, p, sdpa=sdpa)

    for sdpa in (False, True):
        torch.testing.assert_close(ours(0.0), rival(sdpa, 0.0), rtol=1e-4, atol=1e-4)
    forwards = {"packed torch, softmax": lambda: rival(False), "packed torch, SDPA": lambda: rival(True), "native": ours}
    runs = {name: lambda run=run: torch.autograd.grad(run(), [h, pre, *weights], upstream) for name, run in forwards.items()}
    # The last layer of the last step needs keys and values of all tokens, the rest of the last ones.
    layer = 2 * (4 * D * D + 2 * D * INNER)
    flops = P * layer * (T * LAYERS - 1) + P * 4 * D * D + B * (layer - 4 * D * D)
    return f"{kind}, {P} tokens T{T} {LAYERS} layers p{p}", forwards, runs, flops


@pytest.mark.parametrize("p", [0.5, 0.0])
@pytest.mark.parametrize("kind", ["mean 7", "all 50"])
def test_against_packed_torch(compare, kind, p):
    shape, _, runs, _ = case(kind, p)
    compare("recurrence", shape, runs, CHECK, rounds=5)


@pytest.mark.parametrize("p", [0.5, 0.0])
@pytest.mark.parametrize("kind", ["mean 7", "all 50"])
def test_share_of_peak(note, kind, p):
    shape, forwards, runs, flops = case(kind, p)
    with torch.no_grad():
        facts = harness.share_of_peak("recurrence, forward", shape, forwards["native"], flops)
    note(facts + harness.share_of_peak("recurrence, both", shape, runs["native"], 3 * flops))
