"""Compare recurrence on the CPU with packed PyTorch: time, share of the CPU's peak, stored memory, and gradient errors."""

import time

import pytest
import torch

from benchmarks import harness
from lares_fast import LARESConfig, ops, reference
from lares_fast._random import Draw
from lares_fast.gpu_bench import packed_torch

D, INNER, HEADS, LAYERS, T = 64, 256, 2, 2, 4
CHECK = "without dropout outputs agree to 1e-4, gradients to 1e-4 of the largest"


def lengths(kind):
    if kind == "all 50":
        return torch.full((256,), 50)
    return torch.empty(1024).geometric_(1 / 7.3, generator=torch.Generator().manual_seed(0)).long().clamp(1, 50)


class Call:
    """A call of the op, with sequences and weights of the published sizes."""

    def __init__(self, n, p, dtype=torch.float32):
        torch.manual_seed(0)
        config = LARESConfig(n_items=2, hidden_size=D, n_heads=HEADS, inner_size=INNER, n_core_layers=LAYERS)
        weights = [w.detach().to(dtype).requires_grad_() for w in reference.Recurrence(config).parameters()]
        self.n, self.p, self.P, self.B = n, p, int(n.sum()), len(n)
        h, pre = (torch.randn(self.P, D).to(dtype).requires_grad_() for _ in range(2))
        self.h, self.pre, self.weights, self.inputs = h, pre, weights, [h, pre, *weights]
        self.offsets = torch.cat((torch.zeros(1, dtype=torch.int64), n.cumsum(0)))
        self.upstream = torch.randn(self.B, D).to(dtype)

    def forward(self, p=None, depth=T, output="last", backend="native"):
        p = self.p if p is None else p
        draw = Draw((1, 2), torch.arange(self.B)) if p else None
        options = {"n_heads": HEADS, "pre": self.pre, "depth": depth, "output": output, "draw": draw, "dropout": p}
        return ops.recurrence(self.h, self.offsets, self.weights, **options, backend=backend)

    def gradients(self, out):
        return torch.autograd.grad(out, self.inputs, self.upstream)

    def shape(self, kind):
        return f"{kind}, {self.P} tokens T{T} {LAYERS} layers p{self.p}"


def without_grad(run):
    with torch.no_grad():
        return run()


def agree(found, expected):
    # The exact gradient of a key's bias is zero. PyTorch returns rounding errors there.
    none = 1e-6 * max(float(b.abs().max()) for b in expected)

    def alike(a, b):
        largest = float(b.abs().max())
        return float(a.abs().max()) <= none if largest <= none else float((a - b).abs().max()) <= 1e-4 * largest

    return all(map(alike, found, expected))


@pytest.mark.parametrize("p", [0.5, 0.0])
@pytest.mark.parametrize("kind", ["mean 7", "all 50"])
def test_against_packed_torch(compare, kind, p):
    call = Call(lengths(kind), p)
    plan = packed_torch.buckets(call.n)

    def rival(sdpa, p=p):
        return packed_torch.recurrence(call.h, call.pre, call.n, plan, call.weights, HEADS, T, p, sdpa=sdpa)

    ours = call.forward(0.0)
    for sdpa in (False, True):
        torch.testing.assert_close(ours, rival(sdpa, 0.0), rtol=1e-4, atol=1e-4)
    assert agree(call.gradients(ours), call.gradients(rival(False, 0.0)))
    runs = {
        "packed torch, softmax": lambda: call.gradients(rival(False)),
        "packed torch, SDPA": lambda: call.gradients(rival(True)),
        "native": lambda: call.gradients(call.forward()),
    }
    compare("recurrence, both", call.shape(kind), runs, CHECK, rounds=5)


@pytest.mark.parametrize("p", [0.5, 0.0])
@pytest.mark.parametrize("kind", ["mean 7", "all 50"])
def test_share_of_peak(note, kind, p):
    call = Call(lengths(kind), p)
    # The last layer of the last step computes keys and values of all tokens, and everything else of the last tokens only.
    layer = 2 * (4 * D * D + 2 * D * INNER)
    flops = call.P * layer * (T * LAYERS - 1) + call.P * 4 * D * D + call.B * (layer - 4 * D * D)
    facts = harness.share_of_peak("recurrence, forward", call.shape(kind), lambda: without_grad(call.forward), flops)
    both = lambda: call.gradients(call.forward())  # noqa: E731
    note(facts + harness.share_of_peak("recurrence, both", call.shape(kind), both, 3 * flops))


@pytest.mark.parametrize("kind", ["mean 7", "all 50"])
def test_threads(compare, kind):
    call = Call(lengths(kind), 0.5)

    def on(threads):
        torch.set_num_threads(threads)
        try:
            out = call.forward()
            return out, *call.gradients(out)
        finally:
            torch.set_num_threads(1)

    assert all(torch.equal(a, b) for a, b in zip(on(1), on(2), strict=True))
    runs = {"native, 1 thread": lambda: on(1), "native, 2 threads": lambda: on(2)}
    check = "both give the same bits"
    compare("recurrence, wall time", call.shape(kind), runs, check, rounds=7, clock=time.perf_counter)


def test_memory_for_the_backward(note):
    """Count the bytes that the graph stores besides the inputs, for each token and application of a layer."""
    call = Call(lengths("mean 7"), 0.5)
    inputs, stored = {x.data_ptr() for x in call.inputs}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x) or x, lambda x: x):
        call.forward(output="tokens")
    size = sum(x.nbytes for x in stored if x.data_ptr() not in inputs)
    name = "bytes kept a token and layer application"
    note([harness.Fact("recurrence", call.shape("mean 7"), name, size / (call.P * T * LAYERS))])


@pytest.mark.parametrize("p", [0.5, 0.0])
def test_gradient_error(note, p):
    """Find the largest error of any gradient against fp64, as a share of that gradient's largest value.

    The other candidate is the padded reference, because it draws the same dropout masks.
    """
    n = lengths("mean 7")
    call, double = Call(n, p), Call(n, p, torch.float64)
    truth = double.gradients(double.forward(backend="reference"))
    facts = []
    for name, backend in (("native", "native"), ("torch fp32", "reference")):
        found = call.gradients(call.forward(backend=backend))
        largest = max(float(x.abs().max()) for x in truth)
        # The exact gradient of a key's bias is zero.
        true = [(a, b) for a, b in zip(found, truth, strict=True) if b.abs().max() > 1e-9 * largest]
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in true)
        facts.append(harness.Fact("recurrence", call.shape("mean 7"), f"gradient error against fp64, {name}", error))
    note(facts)


@pytest.mark.parametrize("of", ["T", "tokens"])
def test_cost_is_linear(note, of):
    """Measure the nanoseconds of forward and backward, for each token and application of a layer."""
    runs, work = {}, {}
    for factor in (1, 2, 4, 8):
        depth = factor if of == "T" else T
        call = Call(lengths("mean 7") if of == "T" else lengths("mean 7")[: 128 * factor], 0.5)
        call.upstream = torch.ones(call.P, D)
        name = f"{call.P} tokens T{depth} {LAYERS} layers p0.5"
        work[name] = call.P * depth * LAYERS
        runs[name] = lambda call=call, depth=depth: call.gradients(call.forward(depth=depth, output="tokens"))
    rows = harness.interleave("recurrence", "", runs, "", rounds=5)
    name = f"ns a token and layer application, by {of}"
    note(
        [
            harness.Fact("recurrence, all states", row.candidate, name, 1e9 * row.cpu_s_median / work[row.candidate])
            for row in rows
        ]
    )
