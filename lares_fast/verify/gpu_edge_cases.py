"""Steps of ``lares-fast gpu-day`` at the edges: a sanitizer's, forked children, graphs and their seeds, offsets beyond 2^31."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lares_fast import _native, ops, reference
from lares_fast._random import Draw
from lares_fast.config import LARESConfig
from lares_fast.ops.attention import AttentionCall
from lares_fast.ops.recurrence import build_call
from lares_fast.verify import cases
from lares_fast.verify.comparison import device_of, equal, gpu_backends, kernels_of, passed, skipped, verdict

Result = dict[str, Any]
_HALF = torch.bfloat16


def small(rehearse: bool, quick: bool) -> Result:
    """Every kernel once: what a sanitizer watches."""
    with kernels_of(rehearse):
        for op, backend in gpu_backends(rehearse):
            for dtype in (torch.float32,) if backend == "cuda" else (torch.float32, _HALF):
                cases.trial(op, integers=False).results(backend, dtype, device_of(rehearse))
    return passed()


class _OnTheCPU(Dataset[Tensor]):
    """What a worker may do: work on the CPU."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        items = torch.arange(12.0).view(6, 2).roll(i, 0)
        return ops.topk(torch.ones(1, 2), items, 1, backend="reference")[1]


def fork(rehearse: bool, quick: bool) -> Result:
    """A forked child and the workers of a DataLoader leave the parent's GPU as it was."""
    faults = []
    with kernels_of(rehearse):
        trial = cases.trial("linear_cross_entropy", integers=False)
        first = trial.results("triton", torch.float32, device_of(rehearse))
        child = os.fork()
        if not child:
            # Without what Python does at the end: nothing of the parent's is touched.
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            faults.append("a child that does nothing ended badly")
        if not equal(first, trial.results("triton", torch.float32, device_of(rehearse))):
            faults.append("after a fork the parent got another answer")
        workers = DataLoader(_OnTheCPU(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        if [int(best) for best in workers] != [5, 0, 1, 2]:
            faults.append("a worker got another answer on the CPU")
        if not equal(first, trial.results("triton", torch.float32, device_of(rehearse))):
            faults.append("after the workers the parent got another answer")
    return verdict(faults)


def replays(rehearse: bool, quick: bool, op: str) -> Result:
    """Dropout in a captured graph follows the seed on the device; a rehearsal calls where a GPU replays."""
    faults = []
    with kernels_of(rehearse):
        call, seed = {"attention": _attention_by_seed, "recurrence": _recurrence_by_seed}[op](device_of(rehearse))
        replay = call if rehearse else _captured(call)

        def under(value: int, run: Callable[[], Tensor] = replay) -> Tensor:
            seed.fill_(value)
            return run()

        first, again, other, back = (under(value) for value in (7, 7, 8, 7))
        if not torch.equal(first, again) or not torch.equal(first, back):
            faults.append("replays with one seed differ")
        if torch.equal(first, other):
            faults.append("a new seed gives the masks of the old")
        if not torch.equal(other, under(8, call)):
            faults.append("a replay with a new seed differs from a call")
    return verdict(faults)


def capture(rehearse: bool, quick: bool, op: str) -> Result:
    """A captured graph of the public op follows new inputs; a rehearsal calls where a GPU replays."""
    backend = "triton" if op in ("target_logprob", "attention", "recurrence") else "reference" if rehearse else "cuda"
    if backend == "cuda" and not (said := _native.capability()).startswith("ok"):
        return skipped(said)
    device, faults = device_of(rehearse), []
    given = torch.randn(40, 64).to(device)
    items, target = torch.randn(500, 64).to(device), torch.arange(40, device=device)
    offsets, heads = torch.tensor([0, 33, 40], device=device), given.view(40, 2, 32)
    _, _, weights, n_heads = _recurrence(64, torch.float32, device, B=1)
    calls: dict[str, Callable[[], Tensor]] = {
        "target_logprob": lambda: ops.target_logprob(given, items, target, backend=backend),
        "attention": lambda: ops.attention(heads, heads, heads, offsets, 33, backend=backend),
        "recurrence": lambda: ops.recurrence(
            given, offsets, weights, n_heads=n_heads, pre=given, depth=2, longest=33, backend=backend
        ),
        "topk": lambda: torch.stack([part.double() for part in ops.topk(given, items, 10, backend=backend)]),
        "target_rank": lambda: ops.target_rank(given, items, target, backend=backend),
    }
    with kernels_of(rehearse), torch.no_grad():
        replay = calls[op] if rehearse else _captured(calls[op])
        for number in range(1 if rehearse else 3):
            given.copy_(torch.randn_like(given))
            if not torch.equal(replay(), calls[op]()):
                faults.append(f"replay {number} with new inputs differs from a call")
    return verdict(faults)


def _captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    # A capture refuses kernels that did not run yet.
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out.clone()

    return replay


def _attention_by_seed(device: str) -> tuple[Callable[[], Tensor], Tensor]:
    """(output and gradients of attention, the seed that they read)."""
    query, key, value, grad = torch.randn(4, 40, 2, 32).to(device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    offsets, rows = torch.tensor([0, 33, 40], device=device), torch.arange(2, device=device)
    call = AttentionCall(query, key, value, offsets, rows, seed, 33, dropout=0.5, step=2, layer=1, backend="triton")

    def run() -> Tensor:
        out, lse = torch.ops.lares_fast.attention(*call.arguments())
        return torch.stack((out, *torch.ops.lares_fast.attention_backward(*call.arguments(), out, lse, grad)))

    return run, seed


def _recurrence_by_seed(device: str) -> tuple[Callable[[], Tensor], Tensor]:
    """(output and gradients of the recurrence, the seed that they read)."""
    h, offsets, weights, n_heads = _recurrence(64, torch.float32, device, B=2)
    how: dict[str, Any] = {"n_heads": n_heads, "pre": h, "depth": 2, "output": "tokens", "longest": 32, "backend": "triton"}
    draw = Draw((0, 0), torch.arange(2, device=device))
    call = replace(build_call(h, offsets, weights, draw=draw, dropout=0.5, **how), keep=True)

    def run() -> Tensor:
        out, tape, tag = torch.ops.lares_fast.recurrence(*call.arguments())
        gradients = torch.ops.lares_fast.recurrence_backward(*call.arguments(), torch.ones_like(out), tape, tag)
        return torch.cat([x.flatten() for x in (out, *gradients)])

    assert call.seed is not None
    return run, call.seed


def _recurrence(width: int, dtype: torch.dtype, device: str, B: int) -> tuple[Tensor, Tensor, list[Tensor], int]:
    """(h, offsets, weights, heads) of ``B`` equal sequences of 32 tokens."""
    config = LARESConfig(n_items=2, hidden_size=width, n_heads=2, inner_size=64, n_core_layers=1)
    weights = [x.detach().to(device, dtype) for x in reference.Recurrence(config).parameters()]
    h = torch.randn(32, width).to(device, dtype).repeat(B, 1)
    return h, 32 * torch.arange(B + 1, device=device), weights, config.n_heads


def _large(step: Callable[[str, int], list[str]], bytes_an_element: int, least: int) -> Callable[[bool, bool], Result]:
    """A step on tensors of more than 2^31 elements; a rehearsal has ``least``."""

    def run(rehearse: bool, quick: bool) -> Result:
        elements = least if rehearse else 2**31 + 2**20
        if not rehearse:
            if quick:
                return skipped("--quick has small shapes only")
            need, free = elements * bytes_an_element, torch.cuda.mem_get_info()[0]
            if free < need:
                return skipped(f"it needs {need / 2**30:.0f} GiB of GPU memory, and {free / 2**30:.0f} GiB are free")
        with kernels_of(rehearse):
            return verdict(step(device_of(rehearse), elements), elements=elements)

    return run


def large_attention(device: str, elements: int) -> list[str]:
    """Many equal sequences under equal masks: the last, far behind 2^31, is as one alone. Returns the faults."""
    length, H, E = 64, 2, 128
    one = [torch.randn(length, H, E).to(device, _HALF) for _ in range(4)]

    def call(B: int) -> list[Tensor]:
        query, key, value, grad = (x.repeat(B, 1, 1) for x in one)
        leaves = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
        draw = Draw((5, 7), torch.zeros(B, dtype=torch.int64, device=device))
        offsets = length * torch.arange(B + 1, device=device)
        out = ops.attention(*leaves, offsets, length, draw=draw, dropout=0.5, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    alone = call(1)
    return _differ(("out", "d query", "d key", "d value"), [x[-length:] for x in call(-(-elements // (length * H * E)))], alone)


def large_recurrence(device: str, elements: int) -> list[str]:
    """As :func:`large_attention`; the states that are saved for the backward are what is large."""
    width = 64
    # Interpreted, a step takes seconds.
    depth = 8 if elements > 2**31 else 1
    one = torch.randn(4, width).to(device, _HALF)

    def call(B: int) -> list[Tensor]:
        torch.manual_seed(0)
        h, offsets, weights, n_heads = _recurrence(width, _HALF, device, B)
        draw = Draw((5, 7), torch.zeros(B, dtype=torch.int64, device=device))
        how: dict[str, Any] = {"n_heads": n_heads, "draw": draw, "dropout": 0.5, "depth": depth, "longest": 32}
        h.requires_grad_()
        out = ops.recurrence(h, offsets, weights, pre=h.detach(), backend="triton", **how)
        return [out.detach()[-2:], torch.autograd.grad(out, h, one.repeat(B // 4, 1))[0][-64:]]

    # A tile has two sequences, whose places in it may differ in the last bit.
    return _differ(("out", "d h"), call(-(-elements // (4 * 32 * width * depth)) * 4), call(4))


def _differ(names: tuple[str, ...], found: list[Tensor], expected: list[Tensor]) -> list[str]:
    return [
        f"{name} behind 2^31 elements is another" for name, a, b in zip(names, found, expected, strict=True) if not a.equal(b)
    ]


def large_linear_cross_entropy(device: str, elements: int) -> list[str]:
    """All rows of the table are 0 but the last: the log-probabilities and gradients are known."""
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
    wanted = {
        "log-probability": (out, torch.stack((score[0] - lse[0], -lse[1]))),
        "d hidden": (d_hidden, scale * miss[:, None] * last),
        "d items, last": (d_items[-1], scale * miss @ h),
        "d items, first": (d_items[0], scale * zero @ h),
    }
    bound = 2.0**-6
    errors = {name: (found.double() - want).abs().max() / want.abs().max() for name, (found, want) in wanted.items()}
    return [f"{name}: relative error {error:.3g}" for name, error in errors.items() if not error <= bound]


def _large_catalog(rehearse: bool, quick: bool) -> Result:
    """The CUDA kernels, which nothing interprets here."""
    said = _native.capability()
    if rehearse or not said.startswith("ok"):
        return skipped("there is no interpreter of the CUDA kernels: the tests emulate them" if rehearse else said)
    return _large(large_catalog, 6, 0)(rehearse, quick)


def large_catalog(device: str, elements: int, backend: str = "cuda") -> list[str]:
    """All items score 0 but the last, which is one query's best and the other's worst."""
    D = 64
    N = -(-elements // D)
    query = torch.ones(2, D, device=device)
    query[1] = -1
    items = torch.zeros(N, D, device=device)
    items[-1] = 1
    _, ids = ops.topk(query, items, 3, backend=backend)
    target = torch.tensor([N - 1, N - 1], device=device)
    rank = ops.target_rank(query, items, target, backend=backend)
    wanted = {"topk": (ids.tolist(), [[N - 1, 0, 1], [0, 1, 2]]), "target_rank": (rank.tolist(), [0, N - 1])}
    return [f"{name}: {found} instead of {want}" for name, (found, want) in wanted.items() if found != want]


LARGE: dict[str, Callable[..., Result]] = {
    "large_attention": _large(large_attention, 22, 2**15),
    "large_linear_cross_entropy": _large(large_linear_cross_entropy, 7, 2**13),
    "large_recurrence": _large(large_recurrence, 12, 2**14),
    "large_catalog": _large_catalog,
}

STEPS: dict[str, Callable[..., Result]] = {"small": small, "fork": fork, "replays": replays, "capture": capture, **LARGE}
