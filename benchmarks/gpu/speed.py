"""Speed on one GPU against the fastest ways known in PyTorch. first.py runs it; each row is checked, timed and written.

Candidates take turns, by events of the device around as many calls as fill 20 ms; a row has the median of the turns, the
fastest and the slowest. A candidate whose result is not the reference's within its bound fails its row: it is not timed then.
A floor is what the machine, as measured in the first row, needs for the bytes and the operations alone.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).resolve().parents[2]))
import lares_fast
from benchmarks import baseline_official, cases, packed_torch
from lares_fast import LARESConfig, ops, reference
from lares_fast.cli.gpu_day import Report
from lares_fast.sequences import Sequences, unpad
from lares_fast.verify.gpu_plan import read

D, TURNS, FILL_MS, MOST_CALLS = 64, 7, 20.0, 200
# Seconds without which a row is not begun.
LEAST = 12
FP32, BF16 = torch.float32, torch.bfloat16
# Of the largest number of a result.
BOUND = {FP32: 1e-4, BF16: 5e-2}
# A candidate that does not compute the same is shown, and no gain is told against it.
NOT_EXACT = "(not exact)"


class Machine:
    """Where rows run, how they are timed, and what the machine can do; peaks are guesses until they are measured."""

    def __init__(self, rehearse):
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.copy, self.peak = 4.0e12, {"fp32": 60e12, "tf32": 395e12, "bf16": 790e12}

    def small(self, *sizes):
        """A rehearsal's sizes; they only show that a row runs."""
        return [min(size, most) for size, most in zip(sizes, (8, 3000), strict=False)] if self.rehearse else sizes

    def backend(self, name):
        return "reference" if self.rehearse else name

    def once(self, call, count):
        """Milliseconds of a call, of ``count`` calls one behind the other."""
        if self.rehearse:
            began = time.perf_counter()
            for _ in range(count):
                call()
            return 1e3 * (time.perf_counter() - began) / count
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count

    def milliseconds(self, calls):
        """The turns of each of ``calls``, which ran before."""
        counts = {name: self.calls_of(call) for name, call in calls.items()}
        turns = {name: [] for name in calls}
        for _ in range(1 if self.rehearse else TURNS):
            for name, call in calls.items():
                turns[name].append(self.once(call, counts[name]))
        return turns

    def calls_of(self, call):
        """How many calls fill a turn."""
        if self.rehearse:
            return 1
        self.once(call, 1)
        return max(1, min(MOST_CALLS, int(FILL_MS / max(self.once(call, 1), 1e-3))))


class Row:
    """Candidates of one row, checked as they are added."""

    def __init__(self, machine):
        self.machine, self.calls, self.faults, self.facts = machine, {}, [], {"first_call_s": {}, "left_out": {}}

    def add(self, name, call, check):
        """A candidate; ``check`` says of its result what is wrong."""
        began = time.monotonic()
        found = call()
        if not self.machine.rehearse:
            torch.cuda.synchronize()
        self.facts["first_call_s"][name] = round(time.monotonic() - began, 2)
        self.faults += [f"{name}: {fault}" for fault in check(found)]
        self.calls[name] = call

    def add_captured(self, of, check):
        """The candidate ``of`` as a replayed CUDA graph, where it can be captured; the row tells why it cannot."""
        if self.machine.rehearse:
            return
        try:
            call = captured(self.calls[of])
        except RuntimeError as error:
            if not is_of_capture(error):
                raise
            self.facts["left_out"][f"{of}, CUDA graph"] = str(error)[:200]
            return
        self.add(f"{of}, CUDA graph", call, check)

    def result(self, floor_s):
        """What the report has of the row: it is timed only if no candidate is wrong."""
        if self.faults:
            return {"status": "failed", "faults": self.faults, **self.facts}
        turns = self.machine.milliseconds(self.calls)
        ms = {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in turns.items()}
        said = "a rehearsal has no speed" if self.machine.rehearse else told(ms, 1e3 * floor_s)
        return {"status": "passed", "said": said, "ms": ms, "floor_ms": 1e3 * floor_s, **self.facts}


def told(ms, floor):
    """A row in a line."""
    medians = {name: one["median"] for name, one in ms.items()}
    ours = [name for name in ms if name.startswith("ours")]
    best = min(ours, key=medians.get)
    gain = min(medians[name] for name in ms if name not in ours and NOT_EXACT not in name) / medians[best]
    cells = ", ".join(f"{name} {one['median']:.4g} ({one['min']:.4g}..{one['max']:.4g})" for name, one in ms.items())
    return f"x{gain:.2f} of the best rival by {best}; floor {floor:.4g}, {floor / medians[best]:.0%} of it reached; ms: {cells}"


def is_of_capture(error):
    """Whether a capture was refused; what leaves the GPU beyond use is not for this row to answer."""
    return any(word in str(error) for word in ("captur", "CPU tensor", "pinned"))


def captured(call):
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay():
        graph.replay()
        return out

    return replay


def near(truth, bound):
    """A check: every tensor of a result is that of ``truth``, within ``bound`` of its largest number.

    Gradients that are zero by construction, as those of key biases, are rounding of the others; a tenth of their rms counts.
    """
    truth = [x.double() for x in truth]
    least = torch.cat([x.flatten() for x in truth]).square().mean().sqrt() / 10

    def check(found):
        found = found if isinstance(found, (tuple, list)) else [found]
        pairs = zip(found, truth, strict=True)
        errors = [(x.detach().double() - want).abs().max() / want.abs().max().maximum(least) for x, want in pairs]
        return [
            f"tensor {i} is off by {error:.2g} of its largest number" for i, error in enumerate(errors) if not error <= bound
        ]

    return check


def upstream(out):
    """A gradient of ``out``: the same numbers in every dtype, and not all alike."""
    generator = torch.Generator().manual_seed(6)
    return torch.randn(out.shape, generator=generator).to(out) if out.dim() else torch.ones_like(out)


def with_gradients(call, leaves):
    """A call of the output and of its gradients."""
    grad = []

    def run():
        out = call(*leaves)
        if not grad:
            grad.append(upstream(out))
        return out, *torch.autograd.grad(out, leaves, grad[0])

    return run


def in_fp64(call, leaves):
    """What :func:`with_gradients` gives in fp64, for a check."""
    return with_gradients(call, [x.detach().double().requires_grad_() for x in leaves])()


def with_products(kind, call):
    """A call in which the CUDA kernels multiply by ``kind``, which they read at every call."""

    def run():
        os.environ["LARES_FAST_CUDA_PRODUCTS"] = kind
        try:
            return call()
        finally:
            del os.environ["LARES_FAST_CUDA_PRODUCTS"]

    return run


def in_tf32(call):
    def run():
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run


def ceilings(m):
    """Bandwidth of a copy, rates of products, and the time of a launch."""
    size, n = (64, 2**14) if m.rehearse else (8192, 2**30)

    def median(call):
        call()
        return 1e-3 * statistics.median(m.milliseconds({"": call})[""])

    a, b = torch.randn(n, device=m.device), torch.empty(n, device=m.device)
    m.copy = 8 * n / median(functools.partial(b.copy_, a))
    del a, b
    for name, dtype in (("fp32", FP32), ("tf32", FP32), ("bf16", BF16)):
        x, y = (torch.randn(size, size, device=m.device).to(dtype) for _ in range(2))
        product = lambda x=x, y=y: x @ y  # noqa: E731
        m.peak[name] = 2 * size**3 / median(in_tf32(product) if name == "tf32" else product)
    one = torch.zeros(1, device=m.device)
    facts = {"copy TB/s": m.copy / 1e12, **{f"{name} TFLOP/s": rate / 1e12 for name, rate in m.peak.items()}}
    facts["launch us"] = 1e6 * median(lambda: one.add_(1))
    return {"status": "passed", "said": ", ".join(f"{name} {value:.4g}" for name, value in facts.items()), "facts": facts}


def catalog(m, B, N):
    B, N = m.small(B, N)
    generator = torch.Generator().manual_seed(0)
    query, items = (torch.randn(rows, D, generator=generator).to(m.device) for rows in (B, N))
    # Three products in TF32 where the tensor cores are used.
    floor = max(4 * D * (N + B) / m.copy, 6 * B * N * D / m.peak["tf32"])
    return query, items, floor


def chunked_topk(query, items, k, size=131_072):
    values, ids = [], []
    for start in range(0, len(items), size):
        best = torch.topk(query @ items[start : start + size].T, min(k, len(items) - start))
        values.append(best.values)
        ids.append(best.indices + start)
    best = torch.topk(torch.cat(values, 1), k)
    return best.values, torch.cat(ids, 1).gather(1, best.indices)


def topk(m, B, N, k):
    query, items, floor = catalog(m, B, N)
    scores = query.double() @ items.double().T
    truth = torch.topk(scores, k).values

    def check(bound):
        right = near([truth, truth], bound)

        def run(found):
            values, ids = found
            # What fp32 cannot tell apart may stand in another order, but no item twice.
            twice = (ids.sort(1).values.diff(dim=1) == 0).sum().item()
            return right([values, scores.gather(1, ids)]) + ([f"{twice} items stand twice"] if twice else [])

        return run

    exact, row = check(1e-5), Row(m)
    plain = lambda: torch.topk(query @ items.T, k)  # noqa: E731
    ours = lambda: ops.topk(query, items, k, backend=m.backend("cuda"))  # noqa: E731
    row.add("mm + topk", plain, exact)
    row.add("mm + topk, in chunks", lambda: chunked_topk(query, items, k), exact)
    row.add(f"mm in tf32 + topk {NOT_EXACT}", in_tf32(plain), check(1e-2))
    row.add_captured("mm + topk", exact)
    for kind in ("3xtf32", "ffma"):
        row.add(f"ours, {kind}", with_products(kind, ours), exact)
    row.add_captured("ours, 3xtf32", exact)
    return row.result(floor)


def target_rank(m, B, N):
    query, items, floor = catalog(m, B, N)
    target = torch.arange(len(query), device=m.device) * 7 % len(items)

    def plain(query=query, items=items):
        scores = query @ items.T
        return (scores > scores.gather(1, target[:, None])).sum(1)

    truth = plain(query.double(), items.double())

    def check(found):
        # Scores that fp32 cannot tell apart.
        off = (found - truth).abs().max().item()
        return [] if off <= 2 + 1e-5 * len(items) else [f"ranks are off by up to {off}"]

    ours, row = lambda: ops.target_rank(query, items, target, backend=m.backend("cuda")), Row(m)
    row.add("mm, gather, count", plain, check)
    row.add_captured("mm, gather, count", check)
    for kind in ("3xtf32", "ffma"):
        row.add(f"ours, {kind}", with_products(kind, ours), check)
    return row.result(floor)


def cross_entropy(m, M, N, dtype, compiled=False):
    M, N = m.small(M, N)
    hidden = torch.randn(M, D, device=m.device).to(dtype).requires_grad_()
    items = (0.3 * torch.randn(N, D, device=m.device)).to(dtype).requires_grad_()
    target = torch.randint(N, (M,), device=m.device)
    eager = lambda h, x: F.cross_entropy(h @ x.T, target)  # noqa: E731
    leaves, row = (hidden, items), Row(m)
    check = near(in_fp64(eager, leaves), 1e-3 if dtype == FP32 else 1e-1)
    row.add("eager", with_gradients(eager, leaves), check)
    if dtype == FP32:
        row.add(f"eager in tf32 {NOT_EXACT}", in_tf32(with_gradients(eager, leaves)), near(in_fp64(eager, leaves), 5e-2))
    for name, backend in (("in pieces", "reference"), ("ours", m.backend("triton"))):
        call = lambda h, x, backend=backend: ops.linear_cross_entropy(h, x, target, backend=backend)  # noqa: E731
        row.add(name, with_gradients(call, leaves), check)
    row.add_captured("ours", check)
    if compiled and not m.rehearse:
        row.add("torch.compile", with_gradients(torch.compile(eager), leaves), check)
    # Five products of the size of the scores; three exponentials a score, of which a multiprocessor does 16 a cycle.
    exponentials = 0 if m.rehearse else 3 * M * N / (torch.cuda.get_device_properties(0).multi_processor_count * 16 * 1.8e9)
    products = 10 * M * N * D / m.peak["fp32" if dtype == FP32 else "bf16"]
    return row.result(max(products, 3 * hidden.element_size() * D * (M + N) / m.copy, exponentials))


def sequences(m, B, longest, kind):
    lengths = cases.lengths(kind, *(m.small(B)), longest)
    return lengths, torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))


def attention(m, B, longest, kind):
    heads, width, dtype = 2, 32, FP32 if m.rehearse else BF16
    lengths, offsets = sequences(m, B, longest, kind)
    P, places = int(offsets[-1]), offsets.to(m.device)
    real = (torch.arange(longest) < lengths[:, None]).to(m.device)
    packed = [torch.randn(P, heads, width, device=m.device).to(dtype).requires_grad_() for _ in range(3)]

    def pad(x):
        padded = x.new_zeros(len(lengths), longest, heads, width)
        padded[real] = x.detach()
        return padded.transpose(1, 2).contiguous()

    padded = [pad(x).requires_grad_() for x in packed]
    grad = pad(upstream(packed[0]))
    sdpa = lambda *x: F.scaled_dot_product_attention(*x, is_causal=True)  # noqa: E731
    # The padding is no part of the answer, and its gradients are none of the tokens'.
    flat = lambda found: [x.transpose(1, 2)[real] for x in found]  # noqa: E731
    exact = [x.detach().double().requires_grad_() for x in padded]
    out = sdpa(*exact)
    check = near(flat([out, *torch.autograd.grad(out, exact, grad.double())]), BOUND[dtype])
    ours = lambda *x: ops.attention(*x, places, longest, backend=m.backend("triton"))  # noqa: E731
    row = Row(m)

    def rival():
        out = sdpa(*padded)
        return out, *torch.autograd.grad(out, padded, grad)

    row.add("SDPA, padded before", rival, lambda found: check(flat(found)))
    if not m.rehearse:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            row.facts["left_out"]["flash, packed"] = str(error)
        else:
            short = places.to(torch.int32)
            flash = lambda *x: varlen_attn(*x, short, short, longest, longest, window_size=(-1, 0))  # noqa: E731
            row.add("flash, packed", with_gradients(flash, packed), check)
    row.add("ours", with_gradients(ours, packed), check)
    row.add_captured("ours", check)
    # Forward reads three and writes one; backward reads five and writes three.
    return row.result(12 * P * heads * width * 2 / m.copy)


def recurrence(m, B, longest, kind, dtype, T, gradients):
    dtype, layers = FP32 if m.rehearse else dtype, 2
    config = LARESConfig(n_items=2, max_len=longest, n_core_layers=layers)
    torch.manual_seed(0)
    weights = [w.detach().to(m.device, dtype).requires_grad_(gradients) for w in reference.Recurrence(config).parameters()]
    lengths, offsets = sequences(m, B, longest, kind)
    P, places, on_device = int(offsets[-1]), offsets.to(m.device), lengths.to(m.device)
    h, pre = (torch.randn(P, D, device=m.device).to(dtype).requires_grad_(gradients) for _ in range(2))
    leaves = [h, pre, *weights]
    plan = [tuple(x.to(m.device) for x in part) for part in packed_torch.buckets(lengths)]
    plan = [(index, real, mask.to(dtype)) for index, real, mask in plan]

    def ours(backend):
        how = {"n_heads": 2, "depth": T, "longest": longest, "backend": m.backend(backend)}
        return lambda h, pre, *weights: ops.recurrence(h, places, list(weights), pre=pre, **how)

    def packed(sdpa):
        return lambda h, pre, *weights: packed_torch.recurrence(h, pre, on_device, plan, list(weights), 2, T, 0.0, sdpa=sdpa)

    def truth(h, pre, *weights):
        depth = torch.full((len(lengths),), T, device=m.device)
        return reference.recurrence(h, places, list(weights), n_heads=2, pre=pre, depth=depth)

    def run(call):
        return with_gradients(call, leaves) if gradients else lambda: call(*leaves)

    expected = in_fp64(truth, leaves) if gradients else [truth(*(x.double() for x in leaves))]
    # Gradients of weights are sums over all tokens.
    check, row = near(expected, (1e-3 if dtype == FP32 else 2e-1) if gradients else 2 * BOUND[dtype]), Row(m)
    with torch.set_grad_enabled(gradients):
        row.add("packed torch, SDPA", run(packed(True)), check)
        row.add("packed torch, softmax", run(packed(False)), check)
        row.add("ours", run(ours("triton")), check)
        row.add("ours, layers", run(ours("layers")), check)
        for name in ("packed torch, SDPA", "ours"):
            row.add_captured(name, check)
        times = 4 if gradients else 1
        flops = times * P * T * layers * 2 * (4 * D * D + 2 * D * config.inner_size)
        moved = times * (2 * P + len(lengths)) * D * h.element_size()
        return row.result(max(flops / m.peak["fp32" if dtype == FP32 else "bf16"], moved / m.copy))


class SptStep:
    """Steps of phase 1 of one candidate, with Adam; lengths and depths of ours are on the CPU, as its driver gives them."""

    def __init__(self, m, kind, B, candidate, *, dropout=0.5, fixed=False):
        self.device, self.ours, self.depths = m.device, candidate.startswith("ours"), (5, 5, 5)
        config = LARESConfig(n_items=cases.N, dropout=dropout)
        torch.manual_seed(0)
        weights = reference.LARES(config).state_dict()
        build = lares_fast.LARES if self.ours else baseline_official.OfficialLARES
        self.model = build(config).to(m.device).train()
        self.model.load_state_dict(weights)
        if "compile" in candidate:
            self.model.encode = torch.compile(self.model.encode)
        self.autocast = "bf16" in candidate
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=not m.rehearse)
        own, partners = (cases.sequences(kind, B, 20, seed) for seed in (2, 3))
        self.target = torch.randint(1, cases.N, (B,), generator=torch.Generator().manual_seed(4)).to(m.device)
        noise = torch.Generator().manual_seed(5)
        self.states = [3 * torch.randn(B, 20, D, generator=noise) if fixed else None for _ in range(3)]
        if self.ours:
            own, partners = Sequences.from_padded(*own), Sequences.from_padded(*partners)
            of = (own, own, partners)
            self.states = [s if s is None else unpad(s, x.offsets) for s, x in zip(self.states, of, strict=True)]
        self.states = [s if s is None else s.to(m.device) for s in self.states]
        there = (lambda x, n: (x.to(m.device), n)) if self.ours else (lambda x, n: (x.to(m.device), n.to(m.device)))
        self.batches = there(*own), there(*partners)
        self.draws = [cases.draw(i, B) for i in range(3)]

    def loss(self):
        own, partners = self.batches
        given, weights = (self.model, own, self.target, partners), {"alpha": 0.1, "gamma": 0.5}
        with torch.autocast(self.device.type, BF16, enabled=self.autocast):
            if not self.ours:
                with self.device:
                    return baseline_official.spt_loss(*given, self.depths, 2, **weights, dead_work=False, states=self.states)
            passes = tuple(reference.Pass(*one) for one in zip(self.depths, self.draws, self.states, strict=True))
            return reference.spt_loss(*given, passes, 2, **weights).total

    def __call__(self):
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss


def spt_step(m, kind, compiled=False):
    """A whole step; the check is of loss and gradients without dropout, from one h0, as in bench_train_step.py."""
    (B,) = m.small(1024)

    def exact(candidate):
        step = SptStep(m, kind, min(B, 32), candidate, dropout=0.0, fixed=True)
        loss = step.loss()
        loss.backward()
        return [loss.detach(), *(p.grad for _, p in sorted(step.model.named_parameters()))]

    truth, row = exact("official way"), Row(m)
    checks = {"": near(truth, 1e-3), "bf16": near(truth, 1e-1)}
    candidates = ["official way", "official way, autocast bf16", "ours", "ours, autocast bf16"]
    if compiled and not m.rehearse:
        candidates.insert(2, "torch.compile, autocast bf16")
    for name in candidates:
        check = checks["bf16" if "bf16" in name else ""]
        row.faults += [f"{name}: {fault}" for fault in check(exact(name))]
        finite = lambda loss: [] if torch.isfinite(loss) else ["its loss is not finite"]  # noqa: E731
        row.add(name, SptStep(m, kind, B, name), finite)
    # The pre-block and T steps of 2 layers for three passes, forward and backward; the catalog's softmax; Adam.
    own, partners = (int(cases.sequences(kind, B, 20, seed)[1].sum()) for seed in (2, 3))
    flops = 3 * (2 * own + partners) * 12 * 2 * (4 * D * D + 2 * D * 256) + 10 * B * cases.N * D
    parameters = sum(p.numel() for p in row.calls["ours"].model.parameters())
    return row.result(max(flops / m.peak["bf16"], 28 * parameters / m.copy))


# The most valuable first: time may end before the list does.
ROWS: dict[str, Callable[[Machine], dict]] = {
    "speed:ceilings": ceilings,
    "speed:topk:B256-N1M": lambda m: topk(m, 256, 1_000_000, 100),
    "speed:recurrence:fp32-B2048": lambda m: recurrence(m, 2048, 50, "mean 8.75", FP32, 4, False),
    "speed:recurrence:bf16-B2048": lambda m: recurrence(m, 2048, 50, "mean 8.75", BF16, 4, False),
    "speed:recurrence:bf16-B1024-gradients": lambda m: recurrence(m, 1024, 20, "instruments", BF16, 5, True),
    "speed:linear_cross_entropy:fp32-N24588": lambda m: cross_entropy(m, 1024, 24_588, FP32),
    "speed:linear_cross_entropy:bf16-N24588": lambda m: cross_entropy(m, 1024, 24_588, BF16),
    "speed:step": lambda m: spt_step(m, "instruments"),
    "speed:target_rank:B256-N1M": lambda m: target_rank(m, 256, 1_000_000),
    "speed:topk:B256-N24588": lambda m: topk(m, 256, 24_588, 10),
    "speed:topk:B1-N1M": lambda m: topk(m, 1, 1_000_000, 100),
    "speed:attention:L50-full": lambda m: attention(m, 2048, 50, "full"),
    "speed:attention:L20-instruments": lambda m: attention(m, 2048, 20, "instruments"),
    "speed:linear_cross_entropy:bf16-N1M": lambda m: cross_entropy(m, 1024, 1_000_000, BF16),
    "speed:recurrence:bf16-full": lambda m: recurrence(m, 2048, 50, "full", BF16, 4, False),
    "speed:recurrence:bf16-B256": lambda m: recurrence(m, 256, 50, "mean 8.75", BF16, 4, False),
    "speed:recurrence:fp32-B1024-gradients": lambda m: recurrence(m, 1024, 20, "instruments", FP32, 5, True),
    "speed:target_rank:B4096-N24588": lambda m: target_rank(m, 4096, 24_588),
    "speed:topk:B4096-N100k": lambda m: topk(m, 4096, 100_000, 10),
    "speed:linear_cross_entropy:bf16-N24588-compiled": lambda m: cross_entropy(m, 1024, 24_588, BF16, compiled=True),
    "speed:step-compiled": lambda m: spt_step(m, "instruments", compiled=True),
    "speed:step-full": lambda m: spt_step(m, "full"),
}


def run(names, machine, report, lines, end, clock=time.monotonic):
    """The rows ``names`` until ``end``, each written to ``report`` and ``lines`` before the next."""
    for name in names:
        if end - clock() < LEAST:
            return
        # A row that hangs is known by this.
        report.put(name, {"status": "begun"})
        began = time.monotonic()
        if not machine.rehearse:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            row = ROWS[name](machine)
        except Exception as error:
            traceback.print_exc()
            row = {"status": "failed", "log": f"{type(error).__name__}: {str(error)[:500]}"}
        row["seconds"] = round(time.monotonic() - began, 1)
        if not machine.rehearse:
            row["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
        report.put(name, row)
        lines.write(json.dumps({"row": name, **row}) + "\n")
        lines.flush()
        # After an illegal address every later call of this process fails too.
        if "CUDA error" in row.get("log", ""):
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--only", nargs="+", required=True)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    if given.rehearse:
        # Threads that wait for each other on a busy machine take minutes.
        torch.set_num_threads(1)
    place = given.out / "results.json"
    with (given.out / "speed.jsonl").open("a") as lines:
        run(given.only, Machine(given.rehearse), Report(place, (), read(place)), lines, end)


if __name__ == "__main__":
    main()
