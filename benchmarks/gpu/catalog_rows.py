"""Rows of the ops that score a whole catalog: ``topk``, ``target_rank`` and ``linear_cross_entropy``."""

import torch
from torch.nn import functional as F

from benchmarks.gpu.measurement import FP32, NOT_EXACT, Row, in_fp64, in_tf32, near, with_gradients, with_products
from lares_fast import ops

D = 64


def catalog(machine, B, N):
    """Return queries [B, D], items [N, D], and the least seconds that the machine needs to score them."""
    B, N = machine.small(B, N)
    generator = torch.Generator().manual_seed(0)
    query, items = (torch.randn(rows, D, generator=generator).to(machine.device) for rows in (B, N))
    # Tensor cores need three TF32 products for one product in fp32.
    floor = max(4 * D * (N + B) / machine.copy, 6 * B * N * D / machine.peak["tf32"])
    return query, items, floor


def chunked_topk(query, items, k, size=131_072):
    values, ids = [], []
    for start in range(0, len(items), size):
        best = torch.topk(query @ items[start : start + size].T, min(k, len(items) - start))
        values.append(best.values)
        ids.append(best.indices + start)
    best = torch.topk(torch.cat(values, 1), k)
    return best.values, torch.cat(ids, 1).gather(1, best.indices)


def topk(machine, B, N, k):
    query, items, floor = catalog(machine, B, N)
    scores = query.double() @ items.double().T
    truth = torch.topk(scores, k).values

    def check(bound):
        right = near([truth, truth], bound)

        def run(found):
            values, ids = found
            # Items whose scores are equal in fp32 may swap places, but no item may occur twice.
            twice = (ids.sort(1).values.diff(dim=1) == 0).sum().item()
            return right([values, scores.gather(1, ids)]) + ([f"{twice} items occur twice"] if twice else [])

        return run

    exact, row = check(1e-5), Row(machine)
    plain = lambda: torch.topk(query @ items.T, k)  # noqa: E731
    ours = lambda: ops.topk(query, items, k, backend=machine.backend("cuda"))  # noqa: E731
    row.add("mm + topk", plain, exact)
    row.add("mm + topk, in chunks", lambda: chunked_topk(query, items, k), exact)
    row.add(f"mm in tf32 + topk {NOT_EXACT}", in_tf32(plain), check(1e-2))
    row.add_captured("mm + topk", exact)
    for kind in ("3xtf32", "ffma"):
        row.add(f"ours, {kind}", with_products(kind, ours), exact)
    row.add_captured("ours, 3xtf32", exact)
    return row.result(floor)


def target_rank(machine, B, N):
    query, items, floor = catalog(machine, B, N)
    target = torch.arange(len(query), device=machine.device) * 7 % len(items)

    def plain(query=query, items=items):
        scores = query @ items.T
        return (scores > scores.gather(1, target[:, None])).sum(1)

    truth = plain(query.double(), items.double())

    def check(found):
        # Scores that are nearly equal in fp32 may change a rank.
        off = (found - truth).abs().max().item()
        return [] if off <= 2 + 1e-5 * len(items) else [f"ranks are wrong by up to {off}"]

    ours, row = lambda: ops.target_rank(query, items, target, backend=machine.backend("cuda")), Row(machine)
    row.add("mm, gather, count", plain, check)
    row.add_captured("mm, gather, count", check)
    for kind in ("3xtf32", "ffma"):
        row.add(f"ours, {kind}", with_products(kind, ours), check)
    return row.result(floor)


def cross_entropy(machine, M, N, dtype, compiled=False):
    M, N = machine.small(M, N)
    hidden = torch.randn(M, D, device=machine.device).to(dtype).requires_grad_()
    items = (0.3 * torch.randn(N, D, device=machine.device)).to(dtype).requires_grad_()
    target = torch.randint(N, (M,), device=machine.device)
    eager = lambda h, x: F.cross_entropy(h @ x.T, target)  # noqa: E731
    leaves, row = (hidden, items), Row(machine)
    check = near(in_fp64(eager, leaves), 1e-3 if dtype == FP32 else 1e-1)
    row.add("eager", with_gradients(eager, leaves), check)
    if dtype == FP32:
        row.add(f"eager in tf32 {NOT_EXACT}", in_tf32(with_gradients(eager, leaves)), near(in_fp64(eager, leaves), 5e-2))
    for name, backend in (("in chunks", "reference"), ("ours", machine.backend("triton"))):
        call = lambda h, x, backend=backend: ops.linear_cross_entropy(h, x, target, backend=backend)  # noqa: E731
        row.add(name, with_gradients(call, leaves), check)
    row.add_captured("ours", check)
    if compiled and not machine.rehearse:
        row.add("torch.compile", with_gradients(torch.compile(eager), leaves), check)
    # Five products of the size of the scores, and three exponentials for each score. A multiprocessor computes 16
    # exponentials in a cycle.
    rate = 0 if machine.rehearse else torch.cuda.get_device_properties(0).multi_processor_count * 16 * 1.8e9
    exponentials = 3 * M * N / rate if rate else 0
    products = 10 * M * N * D / machine.peak["fp32" if dtype == FP32 else "bf16"]
    return row.result(max(products, 3 * hidden.element_size() * D * (M + N) / machine.copy, exponentials))
