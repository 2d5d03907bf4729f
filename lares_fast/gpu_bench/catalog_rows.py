"""Rows of the ops that score a whole catalog: ``topk``, ``target_rank`` and ``linear_cross_entropy``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lares_fast import _settings, ops
from lares_fast.gpu_bench.candidates import (
    FP32,
    NOT_EXACT,
    OURS,
    Candidates,
    Check,
    Result,
    in_fp64,
    in_tf32,
    near,
    with_gradients,
)
from lares_fast.gpu_bench.machine import Call, Machine

D = 64
# Rows of the queries that are compared with fp64, and items in a chunk of that comparison.
_CHECKED, _CHUNK = 32, 131_072


def _catalog(machine: Machine, B: int, N: int, d: int) -> tuple[Tensor, Tensor]:
    """Return queries [B, d] and items [N, d]."""
    B, N = machine.batch(B), machine.catalog(N)
    generator = torch.Generator(machine.device).manual_seed(0)
    query, items = (torch.randn(rows, d, generator=generator, device=machine.device) for rows in (B, N))
    return query, items


def _scoring(query: Tensor, items: Tensor) -> dict[str, float]:
    """Return the least work of scoring ``items``. Tensor cores need three TF32 products for one product in fp32."""
    (B, d), N = query.shape, len(items)
    return {"bytes": 4 * d * (N + B), "tf32": 6 * B * N * d}


def _with_products(kind: str, call: Call) -> Call:
    """Return ``call`` with products of the CUDA kernels by ``kind``. They read the variable at every call."""

    def run() -> Any:
        with _settings.temporarily("LARES_FAST_CUDA_PRODUCTS", kind):
            return call()

    return run


def chunked_topk(query: Tensor, items: Tensor, k: int, size: int = _CHUNK) -> tuple[Tensor, Tensor]:
    """Return the best ``k`` scores of each query and their items. The scores of ``size`` items exist at a time."""
    values, ids = [], []
    for start in range(0, len(items), size):
        best = torch.topk(query @ items[start : start + size].T, min(k, len(items) - start))
        values.append(best.values)
        ids.append(best.indices + start)
    best = torch.topk(torch.cat(values, 1), k)
    return best.values, torch.cat(ids, 1).gather(1, best.indices)


def topk(machine: Machine, B: int, N: int, k: int, d: int = D) -> Result:
    """Time ``topk`` of B queries over N items of width ``d``."""
    query, items = _catalog(machine, B, N, d)
    sample = query[:: max(1, len(query) // _CHECKED)]
    truth = _topk_in_fp64(sample, items, k)

    def check(bound: float) -> Check:
        right = near([truth, truth], bound)

        def run(found: tuple[Tensor, Tensor]) -> list[str]:
            values, ids = (x[:: max(1, len(query) // _CHECKED)] for x in found)
            scores = torch.einsum("bd,bkd->bk", sample.double(), items[ids].double())
            # Items whose scores are equal in fp32 may swap places, but no item may occur twice.
            twice = int((found[1].sort(1).values.diff(dim=1) == 0).sum())
            return right([values, scores]) + ([f"{twice} items occur twice"] if twice else [])

        return run

    def plain() -> Any:
        return torch.topk(query @ items.T, k)

    exact, row = check(1e-5), Candidates(machine)
    ours = partial(ops.topk, query, items, k, backend=machine.backend("cuda"))
    row.add("mm + topk", plain, exact)
    row.add("mm + topk, in chunks", partial(chunked_topk, query, items, k), exact)
    row.add(f"mm in tf32 + topk {NOT_EXACT}", in_tf32(plain), check(1e-2))
    row.add_captured("mm + topk", exact)
    for kind in _settings.CUDA_PRODUCTS:
        row.add(f"{OURS}, {kind}", _with_products(kind, ours), exact)
    row.add_captured(f"{OURS}, 3xtf32", exact)
    return row.result(_scoring(query, items))


def _topk_in_fp64(query: Tensor, items: Tensor, k: int) -> Tensor:
    """Return the best ``k`` scores of each query in fp64."""
    best = query.new_empty(len(query), 0, dtype=torch.float64)
    for part in items.split(_CHUNK):
        scores = torch.cat((best, query.double() @ part.double().T), 1)
        best = scores.topk(min(k, scores.shape[1])).values
    return best


def target_rank(machine: Machine, B: int, N: int, d: int = D) -> Result:
    """Time ``target_rank`` of B queries over N items of width ``d``."""
    query, items = _catalog(machine, B, N, d)
    target = torch.arange(len(query), device=machine.device) * 7 % len(items)
    every = max(1, len(query) // _CHECKED)
    sample, wanted = query[::every].double(), items[target[::every]].double()
    own = (sample * wanted).sum(1, keepdim=True)
    truth = sum((sample @ part.double().T > own).sum(1) for part in items.split(_CHUNK))

    def check(found: Tensor) -> list[str]:
        # Scores that are nearly equal in fp32 may change a rank.
        off = int((found[::every] - truth).abs().max())
        return [] if off <= 2 + 1e-5 * len(items) else [f"ranks are wrong by up to {off}"]

    def plain() -> Tensor:
        scores = query @ items.T
        return (scores > scores.gather(1, target[:, None])).sum(1)

    def in_chunks() -> Tensor:
        own = (query * items[target]).sum(1, keepdim=True)
        return torch.stack([(query @ part.T > own).sum(1) for part in items.split(_CHUNK)]).sum(0)

    ours, row = partial(ops.target_rank, query, items, target, backend=machine.backend("cuda")), Candidates(machine)
    row.add("mm, gather, count", plain, check)
    row.add("mm, gather, count, in chunks", in_chunks, check)
    row.add_captured("mm, gather, count", check)
    for kind in _settings.CUDA_PRODUCTS:
        row.add(f"{OURS}, {kind}", _with_products(kind, ours), check)
    row.add_captured(f"{OURS}, 3xtf32", check)
    return row.result(_scoring(query, items))


def cross_entropy(machine: Machine, M: int, N: int, dtype: torch.dtype) -> Result:
    """Time ``linear_cross_entropy`` of M states over N items, with gradients."""
    M, N = machine.batch(M), machine.catalog(N)
    generator = torch.Generator(machine.device).manual_seed(0)
    hidden = torch.randn(M, D, generator=generator, device=machine.device).to(dtype).requires_grad_()
    items = (0.3 * torch.randn(N, D, generator=generator, device=machine.device)).to(dtype).requires_grad_()
    target = torch.randint(N, (M,), generator=generator, device=machine.device)
    leaves, row = (hidden, items), Candidates(machine)

    def eager(h: Tensor, x: Tensor) -> Tensor:
        return F.cross_entropy(h @ x.T, target)

    truth = in_fp64(eager, leaves)
    check = near(truth, 1e-3 if dtype == FP32 else 1e-1)
    row.add("eager", with_gradients(eager, leaves), check)
    if dtype == FP32:
        row.add(f"eager in tf32 {NOT_EXACT}", in_tf32(with_gradients(eager, leaves)), near(truth, 5e-2))
    if not machine.rehearse:
        row.add("torch.compile", with_gradients(torch.compile(eager), leaves), check)
    row.add_captured("eager", check)
    for name, backend in (("in chunks", "reference"), (OURS, machine.backend("triton"))):
        call = partial(ops.linear_cross_entropy, target=target, backend=backend)
        row.add(name, with_gradients(call, leaves), check)
    row.add_captured(OURS, check)
    # Five products of the size of the scores, and three exponentials for each score.
    limit = "fp32" if dtype == FP32 else "bf16"
    moved = 3 * hidden.element_size() * D * (M + N)
    return row.result({"bytes": moved, limit: 10 * M * N * D, "exponentials": 3 * M * N})
