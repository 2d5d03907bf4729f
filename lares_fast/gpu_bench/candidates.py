"""Check and time the candidates of a row.

Every candidate is first compared with the reference in fp64. A wrong candidate is a fault of the row and is not timed. The
others take turns: a turn makes as many calls as fill 20 ms, and is timed with events of the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lares_fast.gpu_bench.machine import WARM_UP, Call, Machine
from lares_fast.train.graphs import CudaCapture

# Result of a row: ``status`` (passed, failed or skipped) and what was found.
Result = dict[str, Any]
# Returns what is wrong with the result of a call, as a list of texts.
Check = Callable[[Any], list[str]]

FP32, BF16 = torch.float32, torch.bfloat16
# Largest error that passes, relative to the largest number of a result.
BOUND = {FP32: 1e-4, BF16: 5e-2}
# The names of our candidates begin with this.
OURS = "lares_fast"
# The name of a rival that rounds more than the reference ends with this. It is timed, but no ratio to it is reported.
NOT_EXACT = "(not exact)"
GRAPH = "CUDA graph"


class Candidates:
    """The candidates of one row. Each is checked when it is added."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.calls: dict[str, Call] = {}
        self.faults: list[str] = []
        self.left_out: dict[str, str] = {}
        self.first_call_s: dict[str, float] = {}

    def add(self, name: str, call: Call, check: Check, checked: Call | None = None) -> None:
        """Add the candidate ``name`` if ``check`` finds nothing wrong with the result of ``call``, or of ``checked``.

        An exception of our candidate is a fault. A rival that raises one, for example because it needs too much memory, is
        left out.
        """
        self.machine.stage(name)
        began = time.monotonic()
        try:
            faults = check((checked or call)())
            self.first_call_s[name] = round(time.monotonic() - began, 2)
            if checked and not faults:
                # It may have to be compiled again, and may fail.
                call()
            self.machine.synchronize()
        except Exception as error:
            if is_fatal(error):
                raise
            text = f"{type(error).__name__}: {str(error)[:300]}"
            if name.startswith(OURS):
                self.faults.append(f"{name}: {text}")
            else:
                self.left_out[name] = text
            return
        self.faults += [f"{name}: {fault}" for fault in faults]
        if not faults:
            self.calls[name] = call

    def add_captured(self, of: str, check: Check, call: Call | None = None) -> None:
        """Add the candidate ``of`` as a CUDA graph that is replayed. If it cannot be captured, the row says why.

        ``call`` is what is captured, if the candidate itself copies from the host. A rehearsal runs it and captures nothing.
        """
        if of not in self.calls or (self.machine.rehearse and call is None):
            return
        name, call = f"{of}, {GRAPH}", call or self.calls[of]
        try:
            call = call if self.machine.rehearse else captured(call)
        except RuntimeError as error:
            if is_fatal(error):
                raise
            self.left_out[name] = str(error)[:300]
            return
        self.add(name, call, check)

    def result(self, work: Mapping[str, float], **facts: Any) -> Result:
        """Time the candidates and return the result of the row.

        ``work`` is the least work of the row: ``bytes`` that are moved, and operations by the ceiling that limits them.
        """
        ours = [name for name in self.calls if name.startswith(OURS)]
        if not ours:
            self.faults = self.faults or ["no candidate of lares_fast was added"]
        turns = self.machine.turns(self.calls) if ours else {}
        facts |= {"left_out": self.left_out, "first_call_s": self.first_call_s}
        return finished(self.faults, turns_ms=turns, work=dict(work), **facts)


def finished(faults: Sequence[str], **facts: Any) -> Result:
    """Return the result of a row with ``faults``, which passes if there is none."""
    return {"status": "failed" if faults else "passed", **({"faults": list(faults)} if faults else {}), **facts}


def is_fatal(error: Exception) -> bool:
    """Return whether ``error`` makes the GPU unusable for this process, as an illegal address does."""
    text = str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError) or any(word in text for word in ("captur", "CPU tensor", "pinned")):
        return False
    return any(word in text for word in ("CUDA error", "device-side assert"))


def captured(call: Call) -> Call:
    """Return ``call`` as a CUDA graph that is replayed. Raises the error of the capture."""
    capture, kept = CudaCapture(torch.device("cuda")), []
    with capture.stream():
        for _ in range(WARM_UP):
            call()
    torch.cuda.synchronize()
    replay = capture(lambda: kept.append(call()))

    def run() -> Any:
        replay()
        return kept[0]

    return run


def near(truth: Iterable[Tensor], bound: float) -> Check:
    """Return a check that every tensor of a result is within ``bound`` of ``truth``, relative to its largest number.

    Gradients that are zero by construction, such as the gradients of key biases, hold only rounding errors. So the largest
    number counts as at least a tenth of the rms over all tensors.
    """
    truth = [x.detach().double() for x in truth]
    least = torch.cat([x.flatten() for x in truth]).square().mean().sqrt() / 10

    def check(found: Any) -> list[str]:
        pairs = zip(found if isinstance(found, tuple | list) else [found], truth, strict=True)
        errors = [float((x.detach().double() - y).abs().max() / y.abs().max().maximum(least)) for x, y in pairs]
        wrong = [i for i, error in enumerate(errors) if not error <= bound]
        if not wrong:
            return []
        # NaN counts as the largest error.
        worst = max(wrong, key=lambda i: math.inf if math.isnan(errors[i]) else errors[i])
        others = f", and {len(wrong) - 1} other tensors are wrong" if len(wrong) > 1 else ""
        return [f"the error of tensor {worst} is {errors[worst]:.2g} of its largest number{others}"]

    return check


def upstream(out: Tensor) -> Tensor:
    """Return a gradient of ``out``. Its numbers are not all equal, and do not depend on the dtype beyond rounding."""
    generator = torch.Generator().manual_seed(6)
    return torch.randn(out.shape, generator=generator).to(out) if out.dim() else torch.ones_like(out)


def with_gradients(call: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Call:
    """Return a call that gives the output and its gradients."""
    grad: list[Tensor] = []

    def run() -> tuple[Tensor, ...]:
        out = call(*leaves)
        if not grad:
            grad.append(upstream(out))
        # A result that is kept must not keep the graph of autograd, because later calls would then wait for the stream of
        # this one.
        return out.detach(), *torch.autograd.grad(out, leaves, grad[0])

    return run


def in_fp64(call: Callable[..., Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the result of :func:`with_gradients` in fp64, for a check."""
    found: tuple[Tensor, ...] = with_gradients(call, [x.detach().double().requires_grad_() for x in leaves])()
    return found


def in_tf32(call: Call) -> Call:
    """Return ``call`` with matrix products in TF32."""

    def run() -> Any:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return call()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return run
