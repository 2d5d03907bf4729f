"""Checks of tensors with more than 2^31 elements, whose offsets do not fit 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lares_fast import _native, ops, reference
from lares_fast._random import Draw
from lares_fast.config import LARESConfig
from lares_fast.verify.comparison import Result, device_of, kernels_of, skipped, verdict

_HALF = torch.bfloat16


def recurrence_inputs(width: int, dtype: torch.dtype, device: str, B: int) -> tuple[Tensor, Tensor, list[Tensor], int]:
    """Return (h, offsets, weights, number of heads) of ``B`` equal sequences of 32 tokens."""
    config = LARESConfig.preview(hidden_size=width, n_heads=2, inner_size=64, n_core_layers=1)
    weights = [x.detach().to(device, dtype) for x in reference.Recurrence(config).parameters()]
    h = torch.randn(32, width).to(device, dtype).repeat(B, 1)
    return h, 32 * torch.arange(B + 1, device=device), weights, config.n_heads


def _large(check: Callable[[str, int], list[str]], bytes_per_element: int, rehearsed: int) -> Callable[[bool, bool], Result]:
    """Return a check on tensors of more than 2^31 elements; in a rehearsal they have ``rehearsed`` elements."""

    def run(rehearse: bool, quick: bool) -> Result:
        elements = rehearsed if rehearse else 2**31 + 2**20
        if not rehearse:
            if quick:
                return skipped("--quick runs small shapes only")
            need, free = elements * bytes_per_element, torch.cuda.mem_get_info()[0]
            if free < need:
                return skipped(f"it needs {need / 2**30:.0f} GiB of GPU memory, and {free / 2**30:.0f} GiB are free")
        with kernels_of(rehearse):
            return verdict(check(device_of(rehearse), elements), elements=elements)

    return run


def large_attention(device: str, elements: int) -> list[str]:
    """Compare the last of many equal sequences with a call on one sequence, with dropout. Return the faults."""
    length, H, E = 64, 2, 128
    one = [torch.randn(length, H, E).to(device, _HALF) for _ in range(4)]

    def call(B: int) -> list[Tensor]:
        query, key, value, grad = (x.repeat(B, 1, 1) for x in one)
        leaves = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
        draw = Draw((5, 7), torch.zeros(B, dtype=torch.int64, device=device))
        offsets = length * torch.arange(B + 1, device=device)
        out = ops.attention(*leaves, offsets, length, draw=draw, dropout=0.5, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    expected = call(1)
    last = [x[-length:] for x in call(-(-elements // (length * H * E)))]
    return _differences(("out", "d query", "d key", "d value"), last, expected)


def large_recurrence(device: str, elements: int) -> list[str]:
    """Check the recurrence like :func:`large_attention`. The states saved for the backward are the large tensor."""
    width = 64
    # In the interpreter one step takes seconds.
    depth = 8 if elements > 2**31 else 1
    one = torch.randn(4, width).to(device, _HALF)

    def call(B: int) -> list[Tensor]:
        torch.manual_seed(0)
        h, offsets, weights, n_heads = recurrence_inputs(width, _HALF, device, B)
        draw = Draw((5, 7), torch.zeros(B, dtype=torch.int64, device=device))
        how: dict[str, Any] = {"n_heads": n_heads, "draw": draw, "dropout": 0.5, "depth": depth, "longest": 32}
        h.requires_grad_()
        out = ops.recurrence(h, offsets, weights, pre=h.detach(), backend="triton", **how)
        return [out.detach()[-2:], torch.autograd.grad(out, h, one.repeat(B // 4, 1))[0][-64:]]

    # A tile holds two sequences. The last bit of a result may depend on the place in the tile, so compare two sequences.
    return _differences(("out", "d h"), call(-(-elements // (4 * 32 * width * depth)) * 4), call(4))


def _differences(names: tuple[str, ...], found: list[Tensor], expected: list[Tensor]) -> list[str]:
    pairs = zip(names, found, expected, strict=True)
    return [f"{name} is wrong at an offset beyond 2^31 elements" for name, a, b in pairs if not a.equal(b)]


def large_linear_cross_entropy(device: str, elements: int) -> list[str]:
    """Check the op on items that are 0 except the last, so that all results are known. Return the faults."""
    D, scale = 64, 0.125
    N = -(-elements // D)
    hidden = torch.randn(2, D).to(device, _HALF).requires_grad_()
    items = torch.zeros(N, D, dtype=_HALF, device=device)
    items[-1] = hidden[0].detach()
    items.requires_grad_()
    out = ops.target_logprob(hidden, items, torch.tensor([N - 1, 0], device=device), scale=scale, backend="triton")
    d_hidden, d_items = torch.autograd.grad(out, (hidden, items), out.new_tensor([1.0, 2.0]))
    h, last = hidden.detach().double(), items[-1].detach().double()
    score = scale * (h @ last)
    lse = torch.log(N - 1 + score.exp())
    p = torch.exp(score - lse)
    miss = torch.stack((1 - p[0], -2 * p[1]))
    zero = torch.stack((-torch.exp(-lse[0]), 2 - 2 * torch.exp(-lse[1])))
    results = {
        "log-probability": (out, torch.stack((score[0] - lse[0], -lse[1]))),
        "d hidden": (d_hidden, scale * miss[:, None] * last),
        "d items, last": (d_items[-1], scale * miss @ h),
        "d items, first": (d_items[0], scale * zero @ h),
    }
    bound = 2.0**-6
    errors = {
        name: (found.double() - expected).abs().max() / expected.abs().max() for name, (found, expected) in results.items()
    }
    return [f"{name}: relative error {error:.3g}" for name, error in errors.items() if not error <= bound]


def _large_catalog(rehearse: bool, quick: bool) -> Result:
    """Check the CUDA kernels of the catalog, which have no interpreter."""
    capability = _native.capability()
    if rehearse or not capability.startswith("ok"):
        return skipped("the CUDA kernels have no interpreter: the tests emulate them" if rehearse else capability)
    return _large(large_catalog, 6, 0)(rehearse, quick)


def large_catalog(device: str, elements: int, backend: str = "cuda") -> list[str]:
    """Check both ops on items with score 0 except the last, which is best for one query and worst for the other.

    Return the faults.
    """
    D = 64
    N = -(-elements // D)
    query = torch.ones(2, D, device=device)
    query[1] = -1
    items = torch.zeros(N, D, device=device)
    items[-1] = 1
    _, ids = ops.topk(query, items, 3, backend=backend)
    target = torch.tensor([N - 1, N - 1], device=device)
    rank = ops.target_rank(query, items, target, backend=backend)
    results = {"topk": (ids.tolist(), [[N - 1, 0, 1], [0, 1, 2]]), "target_rank": (rank.tolist(), [0, N - 1])}
    return [f"{name}: {found} instead of {expected}" for name, (found, expected) in results.items() if found != expected]


CHECKS: dict[str, Callable[..., Result]] = {
    "large_attention": _large(large_attention, 22, 2**15),
    "large_linear_cross_entropy": _large(large_linear_cross_entropy, 7, 2**13),
    "large_recurrence": _large(large_recurrence, 12, 2**14),
    "large_catalog": _large_catalog,
}
