"""Checks of how a program may use a GPU: threads and streams, forked processes, CUDA graphs, torch.compile, a sanitizer."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lares_fast import _native, ops
from lares_fast._random import Draw
from lares_fast.config import LARESConfig
from lares_fast.model import LARES
from lares_fast.ops.attention import AttentionCall
from lares_fast.ops.recurrence import build_call
from lares_fast.verify import cases
from lares_fast.verify.comparison import Result, device_of, gpu_backends, kernels_of, passed, same_bits, skipped, verdict
from lares_fast.verify.gpu_large import recurrence_inputs


def every_kernel(rehearse: bool, quick: bool) -> Result:
    """Run every kernel once, on small inputs, for compute-sanitizer to watch."""
    with kernels_of(rehearse):
        for op, backend in gpu_backends(rehearse):
            for dtype in (torch.float32,) if backend == "cuda" else (torch.float32, torch.bfloat16):
                cases.case(op, integers=False).results(backend, dtype, device_of(rehearse))
    return passed()


def streams(rehearse: bool, quick: bool) -> Result:
    """Compare the results of threads, side streams and other GPUs, and copy a model."""
    faults = []
    model = LARES(LARESConfig(n_items=50, hidden_size=32, inner_size=32))
    pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with kernels_of(rehearse):
        case = cases.case("linear_cross_entropy", integers=False)
        first = case.results("triton", torch.float32, device_of(rehearse))
        found: list[cases.Results] = []
        threads = [
            threading.Thread(target=lambda: found.append(case.results("triton", torch.float32, device_of(rehearse))))
            for _ in range(1 if rehearse else 4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(found) != len(threads) or not all(same_bits(first, one) for one in found):
            faults.append("threads got different results")
        if not rehearse:
            with torch.cuda.stream(torch.cuda.Stream()):
                if not same_bits(first, case.results("triton", torch.float32, "cuda")):
                    faults.append("a side stream got a different result")
            for number in range(1, torch.cuda.device_count()):
                if not same_bits(first, case.results("triton", torch.float32, f"cuda:{number}")):
                    faults.append(f"cuda:{number} got a different result")
    return verdict(faults)


class _ItemsOnTheCPU(Dataset[Tensor]):
    """A data set that computes its items on the CPU, as the workers of a DataLoader must."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        items = torch.arange(12.0).view(6, 2).roll(i, 0)
        return ops.topk(torch.ones(1, 2), items, 1, backend="reference")[1]


def fork(rehearse: bool, quick: bool) -> Result:
    """Check that a forked child and the workers of a DataLoader do not disturb the parent's GPU."""
    faults = []
    with kernels_of(rehearse):
        case = cases.case("linear_cross_entropy", integers=False)
        first = case.results("triton", torch.float32, device_of(rehearse))
        child = os.fork()
        if not child:
            # Skip Python's clean-up, which would release resources of the parent.
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            faults.append("a forked child that does nothing ended with an error")
        if not same_bits(first, case.results("triton", torch.float32, device_of(rehearse))):
            faults.append("after a fork the parent got a different result")
        workers = DataLoader(_ItemsOnTheCPU(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        if [int(best) for best in workers] != [5, 0, 1, 2]:
            faults.append("a worker got a different result on the CPU")
        if not same_bits(first, case.results("triton", torch.float32, device_of(rehearse))):
            faults.append("after the workers ended the parent got a different result")
    return verdict(faults)


def graphs(rehearse: bool, quick: bool) -> Result:
    """Check that a first launch during a graph capture raises, and that torch.compile compiles the op without a graph break."""
    if rehearse:
        return skipped("the CPU has no graph capture")
    faults = []
    hidden, items = torch.randn(40, 64, device="cuda"), torch.randn(500, 64, device="cuda")
    target = torch.arange(40, device="cuda")
    call = functools.partial(ops.target_logprob, items=items, target=target, backend="triton")
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call(hidden)
        faults.append("a first launch during a graph capture raised no error")
    except RuntimeError as error:
        if "before the graph capture" not in str(error):
            faults.append(f"a first launch during a graph capture raised: {error}")
    for mode in ("default", "reduce-overhead"):
        compiled = torch.compile(lambda x: call(x) * 2, fullgraph=True, mode=mode)
        if not torch.allclose(compiled(hidden), call(hidden) * 2):
            faults.append(f"torch.compile in mode {mode} gave a different result")
    return verdict(faults)


def graph_inputs(rehearse: bool, quick: bool, op: str) -> Result:
    """Check that a captured graph of the public op follows new inputs. A rehearsal calls the op instead of a replay."""
    backend = (
        "triton" if op in ("target_logprob", "attention", "embedding", "recurrence") else "reference" if rehearse else "cuda"
    )
    if backend == "cuda" and not (capability := _native.capability()).startswith("ok"):
        return skipped(capability)
    device, faults = device_of(rehearse), []
    given = torch.randn(40, 64).to(device)
    items, target = torch.randn(500, 64).to(device), torch.arange(40, device=device)
    offsets, heads = torch.tensor([0, 33, 40], device=device), given.view(40, 2, 32)
    tables = (items, given, given[0], given[1])
    _, _, weights, n_heads = recurrence_inputs(64, torch.float32, device, B=1)
    calls: dict[str, Callable[[], Tensor]] = {
        "target_logprob": lambda: ops.target_logprob(given, items, target, backend=backend),
        "attention": lambda: ops.attention(heads, heads, heads, offsets, 33, backend=backend),
        "embedding": lambda: ops.embedding(1 + target, offsets, *tables, backend=backend),
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


def graph_seeds(rehearse: bool, quick: bool, op: str) -> Result:
    """Check that dropout in a captured graph follows the seed on the device. A rehearsal calls the op instead of a replay."""
    faults = []
    with kernels_of(rehearse):
        call, seed = _BY_SEED[op](device_of(rehearse))
        replay = call if rehearse else _captured(call)

        def with_seed(value: int, run: Callable[[], Tensor] = replay) -> Tensor:
            seed.fill_(value)
            return run()

        first, again, other, back = (with_seed(value) for value in (7, 7, 8, 7))
        if not torch.equal(first, again) or not torch.equal(first, back):
            faults.append("replays with one seed differ")
        if torch.equal(first, other):
            faults.append("a new seed gives the masks of the old seed")
        if not torch.equal(other, with_seed(8, call)):
            faults.append("a replay with a new seed differs from a call")
    return verdict(faults)


def _captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    # A kernel must run once before a capture.
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out.clone()

    return replay


def _attention_by_seed(device: str) -> tuple[Callable[[], Tensor], Tensor]:
    """Return a call of attention that gives its output and gradients, and the seed tensor that it reads."""
    query, key, value, grad = torch.randn(4, 40, 2, 32).to(device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    offsets, rows = torch.tensor([0, 33, 40], device=device), torch.arange(2, device=device)
    call = AttentionCall(query, key, value, offsets, rows, seed, 33, dropout=0.5, step=2, layer=1, backend="triton")

    def run() -> Tensor:
        out, lse = torch.ops.lares_fast.attention(*call.arguments())
        return torch.stack((out, *torch.ops.lares_fast.attention_backward(*call.arguments(), out, lse, grad)))

    return run, seed


def _recurrence_by_seed(device: str) -> tuple[Callable[[], Tensor], Tensor]:
    """Return a call of the recurrence that gives its output and its gradients, and the seed tensor that they read."""
    h, offsets, weights, n_heads = recurrence_inputs(64, torch.float32, device, B=2)
    options: dict[str, Any] = {"n_heads": n_heads, "pre": h, "depth": 2, "output": "tokens", "longest": 32, "backend": "triton"}
    draw = Draw((0, 0), torch.arange(2, device=device))
    call = replace(build_call(h, offsets, weights, draw=draw, dropout=0.5, **options), keep=True)

    def run() -> Tensor:
        out, tape, tag = torch.ops.lares_fast.recurrence(*call.arguments())
        gradients = torch.ops.lares_fast.recurrence_backward(*call.arguments(), torch.ones_like(out), tape, tag)
        return torch.cat([x.flatten() for x in (out, *gradients)])

    assert call.seed is not None
    return run, call.seed


def _embedding_by_seed(device: str) -> tuple[Callable[[], Tensor], Tensor]:
    """Return a call of the embedding that gives its output and its gradients, and the seed tensor that they read."""
    tables = [torch.randn(size).to(device).requires_grad_() for size in ((50, 64), (33, 64), (64,), (64,))]
    draw, offsets = _draw_by_seed(device)
    items, grad = 1 + torch.arange(40, device=device), torch.randn(40, 64).to(device)

    def run() -> Tensor:
        with torch.enable_grad():
            out = ops.embedding(items, offsets, *tables, draw=draw, dropout=0.5, backend="triton")
            return torch.cat([x.flatten() for x in (out.detach(), *torch.autograd.grad(out, tables, grad))])

    return run, draw.seed(items.device)


def _initial_state_by_seed(device: str) -> tuple[Callable[[], Tensor], Tensor]:
    """Return a call of ``initial_state``, and the seed tensor that it reads."""
    draw, offsets = _draw_by_seed(device)
    return lambda: ops.initial_state(draw, offsets, 40, 64, backend="triton"), draw.seed(offsets.device)


def _draw_by_seed(device: str) -> tuple[Draw, Tensor]:
    """Return a draw whose key is a tensor, and the offsets of two sequences."""
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    return Draw(seed, torch.arange(2, device=device)), torch.tensor([0, 33, 40], device=device)


_BY_SEED: dict[str, Callable[[str], tuple[Callable[[], Tensor], Tensor]]] = {
    "attention": _attention_by_seed,
    "embedding": _embedding_by_seed,
    "initial_state": _initial_state_by_seed,
    "recurrence": _recurrence_by_seed,
}


CHECKS: dict[str, Callable[..., Result]] = {
    "every_kernel": every_kernel,
    "streams": streams,
    "fork": fork,
    "graphs": graphs,
    "graph_inputs": graph_inputs,
    "graph_seeds": graph_seeds,
}
