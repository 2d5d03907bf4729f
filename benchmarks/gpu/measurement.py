"""Check and time the rows of speed.py.

The candidates of a row take turns. A turn makes as many calls as fill 20 ms, and is timed with events of the device. The row
reports the median, the fastest and the slowest turn. Every candidate is first compared with the reference. If one of them is
wrong, the row is reported as failed and is not timed.
"""

import os
import statistics
import time

import torch

TURNS, FILL_MS, MOST_CALLS = 7, 20.0, 200
FP32, BF16 = torch.float32, torch.bfloat16
# Largest error that passes, relative to the largest number of a result.
BOUND = {FP32: 1e-4, BF16: 5e-2}
# The name of a candidate that rounds more than the reference ends with this. It is timed, but no gain over it is reported.
NOT_EXACT = "(not exact)"


class Machine:
    """The device of the rows, its clock, and its rates of copying and multiplying.

    The rates are guesses until the row speed:peaks has measured them.
    """

    def __init__(self, rehearse):
        self.rehearse = rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.copy, self.peak = 4.0e12, {"fp32": 60e12, "tf32": 395e12, "bf16": 790e12}

    def small(self, *sizes):
        """Return ``sizes``, or in a rehearsal sizes that only show that a row runs."""
        return [min(size, most) for size, most in zip(sizes, (8, 3000), strict=False)] if self.rehearse else sizes

    def backend(self, name):
        return "reference" if self.rehearse else name

    def once(self, call, count):
        """Return the milliseconds of a call, averaged over ``count`` calls in a row."""
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
        """Return the times of all turns of each of ``calls``. Each call must have run before."""
        counts = {name: self.calls_of(call) for name, call in calls.items()}
        turns = {name: [] for name in calls}
        for _ in range(1 if self.rehearse else TURNS):
            for name, call in calls.items():
                turns[name].append(self.once(call, counts[name]))
        return turns

    def calls_of(self, call):
        """Return how many calls fill a turn."""
        if self.rehearse:
            return 1
        self.once(call, 1)
        return max(1, min(MOST_CALLS, int(FILL_MS / max(self.once(call, 1), 1e-3))))


class Row:
    """The candidates of one row. Each is checked when it is added."""

    def __init__(self, machine):
        self.machine, self.calls, self.faults, self.facts = machine, {}, [], {"first_call_s": {}, "left_out": {}}

    def add(self, name, call, check):
        """Add a candidate. ``check(result)`` returns what is wrong with its result, as a list of texts."""
        began = time.monotonic()
        found = call()
        if not self.machine.rehearse:
            torch.cuda.synchronize()
        self.facts["first_call_s"][name] = round(time.monotonic() - began, 2)
        self.faults += [f"{name}: {fault}" for fault in check(found)]
        self.calls[name] = call

    def add_captured(self, of, check):
        """Add the candidate ``of`` as a CUDA graph that is replayed. If it cannot be captured, the row says why."""
        if self.machine.rehearse:
            return
        try:
            call = captured(self.calls[of])
        except RuntimeError as error:
            if not is_capture_error(error):
                raise
            self.facts["left_out"][f"{of}, CUDA graph"] = str(error)[:200]
            return
        self.add(f"{of}, CUDA graph", call, check)

    def result(self, floor_s):
        """Time the candidates and return the row for the report. ``floor_s`` is the least time that the machine needs."""
        if self.faults:
            return {"status": "failed", "faults": self.faults, **self.facts}
        turns = self.machine.milliseconds(self.calls)
        ms = {name: {"median": statistics.median(t), "min": min(t), "max": max(t)} for name, t in turns.items()}
        summary = "a rehearsal measures no speed" if self.machine.rehearse else summary_of(ms, 1e3 * floor_s)
        return {"status": "passed", "summary": summary, "ms": ms, "floor_ms": 1e3 * floor_s, **self.facts}


def summary_of(ms, floor):
    """Return one line about a row."""
    medians = {name: one["median"] for name, one in ms.items()}
    ours = [name for name in ms if name.startswith("ours")]
    best = min(ours, key=medians.get)
    gain = min(medians[name] for name in ms if name not in ours and NOT_EXACT not in name) / medians[best]
    cells = ", ".join(f"{name} {one['median']:.4g} ({one['min']:.4g}..{one['max']:.4g})" for name, one in ms.items())
    return (
        f"{best} is {gain:.2f} times as fast as the best rival; the floor of {floor:.4g} ms is {floor / medians[best]:.0%} "
        f"of its time; ms: {cells}"
    )


def is_capture_error(error):
    """Return whether a graph capture failed. Any other error may have made the GPU unusable."""
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
    """Return a check that every tensor of a result is within ``bound`` of ``truth``, relative to its largest number.

    Gradients that are zero by construction, such as the gradients of key biases, hold only rounding errors. So the largest
    number counts as at least a tenth of the rms over all tensors.
    """
    truth = [x.double() for x in truth]
    least = torch.cat([x.flatten() for x in truth]).square().mean().sqrt() / 10

    def check(found):
        found = found if isinstance(found, (tuple, list)) else [found]
        pairs = zip(found, truth, strict=True)
        errors = [(x.detach().double() - expected).abs().max() / expected.abs().max().maximum(least) for x, expected in pairs]
        return [
            f"the error of tensor {i} is {error:.2g} of its largest number"
            for i, error in enumerate(errors)
            if not error <= bound
        ]

    return check


def upstream(out):
    """Return a gradient of ``out``. Its numbers are not all equal, and do not depend on the dtype beyond rounding."""
    generator = torch.Generator().manual_seed(6)
    return torch.randn(out.shape, generator=generator).to(out) if out.dim() else torch.ones_like(out)


def with_gradients(call, leaves):
    """Return a call that gives the output and its gradients."""
    grad = []

    def run():
        out = call(*leaves)
        if not grad:
            grad.append(upstream(out))
        return out, *torch.autograd.grad(out, leaves, grad[0])

    return run


def in_fp64(call, leaves):
    """Return the result of :func:`with_gradients` in fp64, for a check."""
    return with_gradients(call, [x.detach().double().requires_grad_() for x in leaves])()


def with_products(kind, call):
    """Return a call in which the CUDA kernels multiply by ``kind``. They read the variable at every call."""

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
